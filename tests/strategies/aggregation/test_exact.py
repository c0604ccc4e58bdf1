"""The exact mean against dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors, rank, split_rank
from strategies.aggregation.exact import Exact
from tests.helpers.means import SITES, best, close, dense, random_adapter, rounds, true_mean


def aggregate(current, updates, **settings):
    return Exact(**{"rank": 4, "max_rank": None, "seed": 0} | settings).aggregate(current, updates, round=1)


@given(rounds())
def test_mean_of_products_with_mixed_ranks_weights_and_sites(round):
    current, updates = round
    result = aggregate(current, updates)
    for site in SITES:
        assert close(dense(result.adapter, site), true_mean(current, updates, site))
        if not any(site in adapter and len(adapter[site].a) for adapter, _ in updates):  # untrained
            head, tail = split_rank(result.adapter, 4)
            assert all(torch.equal(new, old) for new, old in zip(head[site], current[site], strict=True))
            assert not tail[site].b.any()
    assert result.diagnostics["energy"] == pytest.approx(1.0)
    assert result.diagnostics["residual"] < 1e-6


@given(rounds(), st.randoms(use_true_random=False))
def test_order_of_devices_does_not_matter(round, shuffled):
    current, updates = round
    other = updates.copy()
    shuffled.shuffle(other)
    for options in ({}, {"max_rank": 4}):
        first, second = (aggregate(current, devices, **options).adapter for devices in (updates, other))
        assert all(close(dense(first, site), dense(second, site)) for site in SITES)


@given(rounds(ranks=(1, 4)), st.integers(0, 2**31))
def test_factorization_does_not_matter(round, seed):
    """Replace factors by B M and M⁻¹ A, for random M `[r, r]` with singular values between 1/4 and 4."""
    current, updates = round
    generator = torch.Generator().manual_seed(seed)

    def refactored(factors):
        size = len(factors.a)
        u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for _ in "uv")
        sigma = 4 ** (2 * torch.rand(size, generator=generator).double() - 1)
        m = (u * sigma) @ v.T
        return Factors((torch.linalg.inv(m) @ factors.a.double()).float(), (factors.b.double() @ m).float())

    others = [({site: refactored(f) for site, f in adapter.items()}, weight) for adapter, weight in updates]
    first, second = aggregate(current, updates), aggregate(current, others)
    for site in SITES:
        assert close(dense(second.adapter, site), dense(first.adapter, site))
        assert close(dense(second.adapter, site), true_mean(current, updates, site))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 2**31))
def test_max_rank_keeps_the_best_approximation(ranks, seed):
    current = random_adapter(4, seed)
    updates = [(random_adapter(size, seed + 1 + k), 1.0) for k, size in enumerate(ranks)]
    result = Exact(rank=4, max_rank=4, seed=0).aggregate(current, updates, round=1)
    energies, residuals = [], []
    for site in SITES:
        mean = true_mean(current, updates, site)
        assert result.adapter[site].a.shape[0] == 4
        assert close(dense(result.adapter, site), best(mean, 4))
        sigma = np.linalg.svd(mean, compute_uv=False)
        energies.append((sigma[:4] ** 2).sum() / (sigma**2).sum())
        residuals.append(np.linalg.norm(mean - best(mean, 4)) / np.linalg.norm(mean))
    assert result.diagnostics["energy"] == pytest.approx(np.mean(energies))
    assert result.diagnostics["residual"] == pytest.approx(np.mean(residuals), abs=1e-7)


@given(rounds(ranks=(1, 4)), st.floats(0.05, 0.99))
def test_energy_determines_the_live_directions(round, energy):
    current, updates = round
    result = aggregate(current, updates, rank=1, energy_fraction=energy)
    trained = [site for site in SITES if any(site in adapter for adapter, _ in updates)]
    live = 0
    for site in trained:
        sigma = np.linalg.svd(true_mean(current, updates, site), compute_uv=False)
        kept = (sigma**2).cumsum() / (sigma**2).sum()
        size = 1 + int((kept < energy).sum())
        assert close(dense(result.adapter, site), best(true_mean(current, updates, site), size))
        live = max(live, size)
    assert result.diagnostics["live"] == live
    assert result.diagnostics["energy"] >= energy - 1e-6


def test_devices_can_be_added_one_at_a_time():
    current, updates = random_adapter(4, 0), [(random_adapter(size, size), float(size)) for size in (1, 2, 4)]
    rule = Exact(rank=4, max_rank=4, seed=0)
    mean = rule.start(current)
    for adapter, weight in updates:
        mean.add(adapter, weight)
    stepwise, whole = rule.finish(mean, round=1), rule.aggregate(current, updates, round=1)
    assert all(
        torch.equal(a, b) for site in SITES for a, b in zip(stepwise.adapter[site], whole.adapter[site], strict=True)
    )


def test_single_device_gets_its_product_back():
    current, update = random_adapter(4, 0), random_adapter(4, 1)
    result = Exact(rank=4, max_rank=4, seed=0).aggregate(current, [(update, 3.0)], round=1)
    assert all(close(dense(result.adapter, site), dense(update, site)) for site in SITES)


def test_unchanged_updates_keep_product_and_factors():
    """Averaging the adapter that was sent returns A, up to the orthonormalization of its rows."""
    raw = random_adapter(4, 0)
    current = Exact(rank=4, max_rank=4, seed=0).aggregate(raw, [(raw, 1.0)], round=1).adapter
    unchanged = Exact(rank=4, max_rank=4, seed=0).aggregate(current, [(current, 1.0)], round=2).adapter
    for site in SITES:
        assert torch.allclose(unchanged[site].a, current[site].a, atol=1e-5)
        assert torch.allclose(unchanged[site].b, current[site].b, atol=1e-4)


def test_first_directions_are_the_strongest():
    """After the rotation, the first r directions still span the top r of the mean, for every trained rank r."""
    current = random_adapter(4, 0)
    updates = [(random_adapter(2, 1), 1.0), (random_adapter(4, 2), 1.0)]
    result = Exact(rank=4, max_rank=None, seed=0).aggregate(current, updates, round=1).adapter
    for site in SITES:
        for size in (2, 4):
            head, _ = split_rank(result, size)
            assert close(dense(head, site), best(true_mean(current, updates, site), size))


def test_rows_of_a_are_orthonormal():
    result = Exact(rank=4, max_rank=4, seed=0).aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0)], round=1)
    assert torch.allclose(result.adapter["x"].a @ result.adapter["x"].a.T, torch.eye(4), atol=1e-5)


def test_dead_directions_get_a_random_row():
    """In the first round B is zero, and a metered device trained 2 of 4 directions."""
    current = {site: Factors(f.a, torch.zeros_like(f.b)) for site, f in random_adapter(4, 0).items()}
    updates = [(random_adapter(2, 1), 1.0)]
    rule = Exact(rank=4, max_rank=None, seed=5)
    result = rule.aggregate(current, updates, round=1)
    assert result.diagnostics["live"] == 2
    assert result.diagnostics["rank"] == 4
    for site in SITES:
        a, b = result.adapter[site]
        assert a.shape[0] == 4
        assert (a.norm(dim=1) > 0.1).all()
        assert not b[:, 2:].any()
        assert close(dense(result.adapter, site), dense(updates[0][0], site))
    assert torch.equal(rule.aggregate(current, updates, round=1).adapter["x"].a, result.adapter["x"].a)
    assert not torch.equal(rule.aggregate(current, updates, round=2).adapter["x"].a[2:], result.adapter["x"].a[2:])


def test_zero_mean_can_still_learn():
    zero = {site: Factors(f.a, torch.zeros_like(f.b)) for site, f in random_adapter(4, 0).items()}
    result = Exact(rank=4, max_rank=4, seed=0).aggregate(zero, [(zero, 1.0), (zero, 1.0)], round=1)
    for site in SITES:
        assert not result.adapter[site].b.any()
        assert (result.adapter[site].a.norm(dim=1) > 0.1).all()
    assert result.diagnostics == {"rank": 4.0, "live": 0.0, "energy": 1.0, "residual": 0.0}


def test_rank_beyond_the_side_of_a_matrix():
    """Eight devices of rank 4 stack 32 directions into matrices of at most rank 7 and 9."""
    current = random_adapter(4, 0)
    updates = [(random_adapter(4, 1 + k), 1.0) for k in range(8)]
    result = Exact(rank=4, max_rank=None, seed=0).aggregate(current, updates, round=1)
    assert rank(result.adapter) == 9
    assert result.adapter["y"].a.shape == (9, 7)
    assert all(close(dense(result.adapter, site), true_mean(current, updates, site)) for site in SITES)


def test_max_rank_below_the_trained_rank_is_refused():
    with pytest.raises(ValueError, match=r"max_rank=2: must be at least adapter\.shared\.rank=4"):
        Exact(rank=4, max_rank=2, seed=0)
