"""Rules with one common factor, against the dense mean of the products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD, orthonormalize
from strategies.aggregation.ffa import FFA
from strategies.aggregation.rolora import RoLoRA
from tests.helpers.means import SITES, close, dense, random_adapter, restricted_to, rounds, true_mean

EXACT = {"ffa": FFA(), "rolora": RoLoRA(), "fedsvd": FedSVD(seed=0), "fedsb": FedSB()}


@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)
@given(data=st.data(), number=st.integers(1, 2))
def test_product_is_the_mean_of_products(rule, data, number):
    current, updates = data.draw(rounds() if rule.mixed_ranks else rounds(ranks=(4, 4)))
    updates = restricted_to(current, updates, rule.trains(number))
    result = rule.aggregate(current, updates, round=number).adapter
    assert result.keys() == current.keys()
    for site in SITES:
        assert close(dense(result, site), true_mean(current, updates, site))
        assert result[site].a.dtype == result[site].b.dtype == torch.float32


@pytest.mark.parametrize("rule", [FFA(), RoLoRA(), FedSA(), FedSB()])
@given(round_=rounds(ranks=(4, 4)), number=st.integers(1, 2))
def test_other_factor_is_bitwise_unchanged(rule, round_, number):
    current, updates = round_
    trains = rule.trains(number)
    result = rule.aggregate(current, restricted_to(current, updates, trains), round=number).adapter
    for site in SITES:
        unchanged = result[site].b if trains in ("a", "split") else result[site].a
        assert unchanged is (current[site].b if trains in ("a", "split") else current[site].a)


def test_rolora_alternates_starting_with_b():
    assert [RoLoRA().trains(number) for number in range(1, 5)] == ["b", "a", "b", "a"]


@given(rounds(ranks=(4, 4)))
def test_fedsa_averages_a_over_its_devices(round_):
    current, updates = round_
    result = FedSA().aggregate(current, updates, round=1).adapter
    for site in SITES:
        trained = [(u[site].a.double().numpy(), weight) for u, weight in updates if site in u]
        if trained:
            expected = np.average([a for a, _ in trained], axis=0, weights=[weight for _, weight in trained])
            assert close(result[site].a.double().numpy(), expected)


@given(rounds(ranks=(0, 4)))
def test_fedsvd_decomposes_the_mean(round_):
    """Rows of A are right singular vectors, columns of B left ones times σ, in descending order."""
    current, updates = round_
    updates = restricted_to(current, updates, "b")
    result = FedSVD(seed=0).aggregate(current, updates, round=1).adapter
    for site in SITES:
        a, b = (factor.double().numpy() for factor in result[site])
        assert np.allclose(a @ a.T, np.eye(4), atol=1e-5)
        sigma = np.linalg.svd(true_mean(current, updates, site), compute_uv=False)[:4]
        assert np.allclose(b.T @ b, np.diag(sigma**2), atol=1e-4 * max(1.0, sigma[0] ** 2))


@pytest.mark.parametrize(("size", "inputs", "outputs"), [(4, 12, 9), (4, 3, 9), (4, 12, 2), (0, 5, 5)])
def test_fedsvd_keeps_every_direction_trainable(size, inputs, outputs):
    """Includes a zero product, and a matrix with a side smaller than the rank."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(size, inputs, generator=generator), torch.randn(outputs, size, generator=generator)
    for factors in (Factors(a, b), Factors(a, torch.zeros_like(b))):
        result = orthonormalize(factors)
        assert result.a.shape == (min(size, inputs), inputs)
        assert torch.allclose(result.a @ result.a.T, torch.eye(len(result.a), dtype=torch.float64), atol=1e-6)
        assert torch.allclose(result.b @ result.a, (factors.b @ factors.a).double(), atol=1e-4)
        at_server = FedSVD(seed=0).aggregate({"x": factors}, [({"x": factors}, 1.0)], round=1).adapter["x"]
        assert at_server.a.shape == a.shape
        assert (at_server.a.norm(dim=1) > 0.1).all()


def test_fedsvd_depends_on_the_mean_only():
    """Device-level privacy requires that updates with the same mean give the same adapter."""
    current = random_adapter(4, 0)
    first, second = (random_adapter(4, seed) for seed in (1, 2))
    mean = {site: Factors(f.a, (f.b + second[site].b) / 2) for site, f in first.items()}
    separate = (
        FedSVD(seed=0).aggregate(current, restricted_to(current, [(first, 1.0), (second, 1.0)], "b"), round=1).adapter
    )
    averaged = FedSVD(seed=0).aggregate(current, restricted_to(current, [(mean, 1.0)], "b"), round=1).adapter
    for site in SITES:
        assert torch.allclose(separate[site].a.abs(), averaged[site].a.abs(), atol=1e-4)
        assert torch.allclose(separate[site].b.abs(), averaged[site].b.abs(), atol=1e-4)
