"""Rules under which one factor is everybody's: the dense mean of the products, whatever ranks, sites and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lora.adapter import Factors
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD, orthonormalize
from strategies.aggregation.ffa import FFA
from strategies.aggregation.rolora import RoLoRA
from tests.helpers.means import SITES, close, dense, in_reach, random_adapter, rounds, true_mean

EXACT = {"ffa": FFA(), "rolora": RoLoRA(), "fedsvd": FedSVD(seed=0), "fedsb": FedSB()}


@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), number=st.integers(1, 2))
def test_the_product_is_the_mean_of_products(rule, data, number):
    current, updates = data.draw(rounds() if rule.mixed_ranks else rounds(ranks=(4, 4)))
    updates = in_reach(current, updates, rule.trains(number))
    found = rule.aggregate(current, updates, round=number).adapter
    assert found.keys() == current.keys()
    for site in SITES:
        assert close(dense(found, site), true_mean(current, updates, site))
        assert found[site].a.dtype == found[site].b.dtype == torch.float32


@pytest.mark.parametrize("rule", [FFA(), RoLoRA(), FedSA(), FedSB()])
@settings(max_examples=20, deadline=None)
@given(round_=rounds(ranks=(4, 4)), number=st.integers(1, 2))
def test_the_other_factor_stays_bit_by_bit(rule, round_, number):
    current, updates = round_
    trains = rule.trains(number)
    found = rule.aggregate(current, in_reach(current, updates, trains), round=number).adapter
    for site in SITES:
        same = found[site].b if trains in ("a", "split") else found[site].a
        assert same is (current[site].b if trains in ("a", "split") else current[site].a)


def test_rolora_takes_turns_and_b_begins():
    assert [RoLoRA().trains(number) for number in range(1, 5)] == ["b", "a", "b", "a"]


@settings(max_examples=20, deadline=None)
@given(rounds(ranks=(4, 4)))
def test_fedsa_averages_a_over_those_who_trained_it(round_):
    current, updates = round_
    found = FedSA().aggregate(current, updates, round=1).adapter
    for site in SITES:
        there = [(u[site].a.double().numpy(), weight) for u, weight in updates if site in u]
        if there:
            wanted = np.average([a for a, _ in there], axis=0, weights=[weight for _, weight in there])
            assert close(found[site].a.double().numpy(), wanted)


@settings(max_examples=30, deadline=None)
@given(rounds(ranks=(0, 4)))
def test_fedsvd_is_the_decomposition_of_the_mean(round_):
    """A's rows are the right singular vectors, and the columns of B the left ones times σ, in falling order."""
    current, updates = round_
    updates = in_reach(current, updates, "b")
    found = FedSVD(seed=0).aggregate(current, updates, round=1).adapter
    for site in SITES:
        a, b = (factor.double().numpy() for factor in found[site])
        assert np.allclose(a @ a.T, np.eye(4), atol=1e-5)
        sigma = np.linalg.svd(true_mean(current, updates, site), compute_uv=False)[:4]
        assert np.allclose(b.T @ b, np.diag(sigma**2), atol=1e-4 * max(1.0, sigma[0] ** 2))


@pytest.mark.parametrize(("size", "inputs", "outputs"), [(4, 12, 9), (4, 3, 9), (4, 12, 2), (0, 5, 5)])
def test_fedsvd_keeps_every_direction_alive(size, inputs, outputs):
    """Where the product is zero too, and where a side of the matrix has less than the rank."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(size, inputs, generator=generator), torch.randn(outputs, size, generator=generator)
    for factors in (Factors(a, b), Factors(a, torch.zeros_like(b))):
        found = orthonormalize(factors)
        assert found.a.shape == (min(size, inputs), inputs)
        assert torch.allclose(found.a @ found.a.T, torch.eye(len(found.a), dtype=torch.float64), atol=1e-6)
        assert torch.allclose(found.b @ found.a, (factors.b @ factors.a).double(), atol=1e-4)
        at_server = FedSVD(seed=0).aggregate({"x": factors}, [({"x": factors}, 1.0)], round=1).adapter["x"]
        assert at_server.a.shape == a.shape
        assert (at_server.a.norm(dim=1) > 0.1).all()


def test_fedsvd_sees_the_mean_alone():
    """What privacy per device rests on: updates of one mean give one adapter."""
    current = random_adapter(4, 0)
    one, other = (random_adapter(4, seed) for seed in (1, 2))
    mean = {site: Factors(f.a, (f.b + other[site].b) / 2) for site, f in one.items()}
    apart = FedSVD(seed=0).aggregate(current, in_reach(current, [(one, 1.0), (other, 1.0)], "b"), round=1).adapter
    alone = FedSVD(seed=0).aggregate(current, in_reach(current, [(mean, 1.0)], "b"), round=1).adapter
    for site in SITES:
        assert torch.allclose(apart[site].a.abs(), alone[site].a.abs(), atol=1e-4)
        assert torch.allclose(apart[site].b.abs(), alone[site].b.abs(), atol=1e-4)
