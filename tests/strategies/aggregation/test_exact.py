"""The exact mean against dense matrices in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AntherError
from models.lora.adapter import Factors, rank, split_rank
from strategies.aggregation.exact import Exact
from tests.helpers.means import SITES, best, close, dense, random_adapter, rounds, true_mean


def aggregate(current, updates, **settings):
    return Exact(**{"rank": 4, "max_rank": None, "seed": 0} | settings).aggregate(current, updates, round=1)


@settings(max_examples=60, deadline=None)
@given(rounds())
def test_exact_is_the_mean_of_products_for_mixed_ranks_weights_and_sites(round):
    current, updates = round
    found = aggregate(current, updates)
    for site in SITES:
        assert close(dense(found.adapter, site), true_mean(current, updates, site))
        if not any(site in adapter and len(adapter[site].a) for adapter, _ in updates):  # nobody trained it
            head, tail = split_rank(found.adapter, 4)
            assert all(torch.equal(new, old) for new, old in zip(head[site], current[site], strict=True))
            assert not tail[site].b.any()
    assert found.diagnostics["energy"] == pytest.approx(1.0)
    assert found.diagnostics["residual"] < 1e-6


@settings(max_examples=30, deadline=None)
@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_devices_is_nothing_to_it(round, shuffled):
    current, updates = round
    other = updates.copy()
    shuffled.shuffle(other)
    for settings_ in ({}, {"max_rank": 4}):
        one, two = (aggregate(current, devices, **settings_).adapter for devices in (updates, other))
        assert all(close(dense(one, site), dense(two, site)) for site in SITES)


@settings(max_examples=30, deadline=None)
@given(rounds(ranks=(1, 4)), st.integers(0, 2**31))
def test_how_a_product_is_factored_is_nothing_to_it(round, seed):
    """B M and M⁻¹ A for random M [r, r] whose singular values lie between 1/4 and 4."""
    current, updates = round
    generator = torch.Generator().manual_seed(seed)

    def refactored(factors):
        size = len(factors.a)
        u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for _ in "uv")
        sigma = 4 ** (2 * torch.rand(size, generator=generator).double() - 1)
        m = (u * sigma) @ v.T
        return Factors((torch.linalg.inv(m) @ factors.a.double()).float(), (factors.b.double() @ m).float())

    others = [({site: refactored(f) for site, f in adapter.items()}, weight) for adapter, weight in updates]
    one, two = aggregate(current, updates), aggregate(current, others)
    for site in SITES:
        assert close(dense(two.adapter, site), dense(one.adapter, site))
        assert close(dense(two.adapter, site), true_mean(current, updates, site))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 2**31))
def test_a_capped_rank_keeps_the_best_approximation_and_says_what_is_lost(ranks, seed):
    current = random_adapter(4, seed)
    updates = [(random_adapter(size, seed + 1 + k), 1.0) for k, size in enumerate(ranks)]
    found = Exact(rank=4, max_rank=4, seed=0).aggregate(current, updates, round=1)
    energies, residuals = [], []
    for site in SITES:
        mean = true_mean(current, updates, site)
        assert found.adapter[site].a.shape[0] == 4
        assert close(dense(found.adapter, site), best(mean, 4))
        sigma = np.linalg.svd(mean, compute_uv=False)
        energies.append((sigma[:4] ** 2).sum() / (sigma**2).sum())
        residuals.append(np.linalg.norm(mean - best(mean, 4)) / np.linalg.norm(mean))
    assert found.diagnostics["energy"] == pytest.approx(np.mean(energies))
    assert found.diagnostics["residual"] == pytest.approx(np.mean(residuals), abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(rounds(ranks=(1, 4)), st.floats(0.05, 0.99))
def test_no_more_directions_live_than_hold_the_energy(round, energy):
    current, updates = round
    found = aggregate(current, updates, rank=1, energy=energy)
    trained = [site for site in SITES if any(site in adapter for adapter, _ in updates)]
    live = 0
    for site in trained:
        sigma = np.linalg.svd(true_mean(current, updates, site), compute_uv=False)
        kept = (sigma**2).cumsum() / (sigma**2).sum()
        size = 1 + int((kept < energy).sum())
        assert close(dense(found.adapter, site), best(true_mean(current, updates, site), size))
        live = max(live, size)
    assert found.diagnostics["live"] == live
    assert found.diagnostics["energy"] >= energy - 1e-6


def test_devices_are_taken_in_one_at_a_time():
    current, updates = random_adapter(4, 0), [(random_adapter(size, size), float(size)) for size in (1, 2, 4)]
    rule = Exact(rank=4, max_rank=4, seed=0)
    mean = rule.start(current)
    for adapter, weight in updates:
        mean.add(adapter, weight)
    one, all_ = rule.finish(mean, round=1), rule.aggregate(current, updates, round=1)
    assert all(torch.equal(a, b) for site in SITES for a, b in zip(one.adapter[site], all_.adapter[site], strict=True))


def test_one_device_that_trained_everything_gets_its_product_back():
    current, update = random_adapter(4, 0), random_adapter(4, 1)
    found = Exact(rank=4, max_rank=4, seed=0).aggregate(current, [(update, 3.0)], round=1)
    assert all(close(dense(found.adapter, site), dense(update, site)) for site in SITES)


def test_no_change_leaves_the_product_and_nearly_the_factors():
    """Aligned: averaging what was sent returns A up to the orthonormalisation of its rows."""
    raw = random_adapter(4, 0)
    current = Exact(rank=4, max_rank=4, seed=0).aggregate(raw, [(raw, 1.0)], round=1).adapter
    again = Exact(rank=4, max_rank=4, seed=0).aggregate(current, [(current, 1.0)], round=2).adapter
    for site in SITES:
        assert torch.allclose(again[site].a, current[site].a, atol=1e-5)
        assert torch.allclose(again[site].b, current[site].b, atol=1e-4)


def test_whoever_trains_the_first_directions_holds_the_strongest():
    """After rotation the first r directions still span the top r of the mean, for every r that was trained."""
    current = random_adapter(4, 0)
    updates = [(random_adapter(2, 1), 1.0), (random_adapter(4, 2), 1.0)]
    found = Exact(rank=4, max_rank=None, seed=0).aggregate(current, updates, round=1).adapter
    for site in SITES:
        for size in (2, 4):
            head, _ = split_rank(found, size)
            assert close(dense(head, site), best(true_mean(current, updates, site), size))


def test_rows_of_a_are_orthonormal():
    found = Exact(rank=4, max_rank=4, seed=0).aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0)], round=1)
    assert torch.allclose(found.adapter["x"].a @ found.adapter["x"].a.T, torch.eye(4), atol=1e-5)


def test_dead_directions_get_a_random_row_and_leave_the_product():
    """The first round: nothing is in B yet and a metered device trained 2 of 4."""
    current = {site: Factors(f.a, torch.zeros_like(f.b)) for site, f in random_adapter(4, 0).items()}
    updates = [(random_adapter(2, 1), 1.0)]
    rule = Exact(rank=4, max_rank=None, seed=5)
    found = rule.aggregate(current, updates, round=1)
    assert found.diagnostics["live"] == 2
    assert found.diagnostics["rank"] == 4
    for site in SITES:
        a, b = found.adapter[site]
        assert a.shape[0] == 4
        assert (a.norm(dim=1) > 0.1).all()
        assert not b[:, 2:].any()
        assert close(dense(found.adapter, site), dense(updates[0][0], site))
    assert torch.equal(rule.aggregate(current, updates, round=1).adapter["x"].a, found.adapter["x"].a)
    assert not torch.equal(rule.aggregate(current, updates, round=2).adapter["x"].a[2:], found.adapter["x"].a[2:])


def test_a_mean_of_nothing_is_an_adapter_that_can_still_learn():
    zero = {site: Factors(f.a, torch.zeros_like(f.b)) for site, f in random_adapter(4, 0).items()}
    found = Exact(rank=4, max_rank=4, seed=0).aggregate(zero, [(zero, 1.0), (zero, 1.0)], round=1)
    for site in SITES:
        assert not found.adapter[site].b.any()
        assert (found.adapter[site].a.norm(dim=1) > 0.1).all()
    assert found.diagnostics == {"rank": 4.0, "live": 0.0, "energy": 1.0, "residual": 0.0}


def test_ranks_beyond_the_side_of_a_matrix():
    """Eight devices of rank 4 stack 32 directions into matrices of rank 7 and 9 at most."""
    current = random_adapter(4, 0)
    updates = [(random_adapter(4, 1 + k), 1.0) for k in range(8)]
    found = Exact(rank=4, max_rank=None, seed=0).aggregate(current, updates, round=1)
    assert rank(found.adapter) == 9
    assert found.adapter["y"].a.shape == (9, 7)
    assert all(close(dense(found.adapter, site), true_mean(current, updates, site)) for site in SITES)


def test_a_cap_below_the_trained_rank_is_refused():
    with pytest.raises(AntherError, match=r"max_rank=2: must be at least adapter\.shared\.rank=4"):
        Exact(rank=4, max_rank=2, seed=0)
