"""Aggregation against dense matrices in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import AntherError
from models.adapter import Factors, head_and_tail, rank
from strategies.aggregation import relative_residual
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT

SITES = {"x": (12, 9), "y": (7, 15)}  # in, out


def random_adapter(size, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator)

    return {site: Factors(draw(size, wide), draw(high, size)) for site, (wide, high) in SITES.items()}


def dense(adapter, site):
    return adapter[site].b.double() @ adapter[site].a.double()


def true_mean(current, updates, site):
    """Σ p_k (B_k A_k + tail_k) / Σ p_k, spelled out."""
    products = [dense(u, site) + dense(head_and_tail(current, rank(u))[1], site) for u, _ in updates]
    return np.average([p.numpy() for p in products], axis=0, weights=[weight for _, weight in updates])


def best(matrix, size):
    """The best approximation of this rank (Eckart–Young)."""
    u, s, vh = np.linalg.svd(matrix)
    return (u[:, :size] * s[:size]) @ vh[:size]


def close(found, wanted):
    return np.linalg.norm(np.asarray(found) - wanted) <= 1e-5 * max(np.linalg.norm(wanted), 1e-30)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 10.0)), min_size=1, max_size=5),
    st.integers(4, 6),
    st.integers(0, 2**31),
)
def test_exact_is_the_mean_of_products_for_mixed_ranks_and_weights(devices, current_rank, seed):
    current = random_adapter(current_rank, seed)
    updates = [(random_adapter(size, seed + 1 + k), weight) for k, (size, weight) in enumerate(devices)]
    found = Exact(rank=4, max_rank=None, seed=0).aggregate(current, updates, round=1)
    for site in SITES:
        assert close(dense(found.adapter, site), true_mean(current, updates, site))
    assert found.diagnostics["energy"] == pytest.approx(1.0)
    assert found.diagnostics["residual"] < 1e-6


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


def test_one_device_that_trained_everything_gets_its_product_back():
    current, update = random_adapter(4, 0), random_adapter(4, 1)
    found = Exact(rank=4, max_rank=4, seed=0).aggregate(current, [(update, 3.0)], round=1)
    assert all(close(dense(found.adapter, site), dense(update, site).numpy()) for site in SITES)


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
            head, _ = head_and_tail(found, size)
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
        assert close(dense(found.adapter, site), dense(updates[0][0], site).numpy())
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


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5), st.integers(0, 2**31))
def test_fedit_is_the_average_of_each_factor(weights, seed):
    updates = [(random_adapter(3, seed + k), weight) for k, weight in enumerate(weights)]
    found = FedIT().aggregate(random_adapter(3, seed + 99), updates, round=1)
    for site in SITES:
        for part in (0, 1):
            wanted = np.average([u[site][part].double().numpy() for u, _ in updates], axis=0, weights=weights)
            assert np.allclose(found.adapter[site][part], wanted, atol=1e-6)
    residuals = []
    for site in SITES:
        mean = true_mean(updates[0][0], updates, site)
        residuals.append(np.linalg.norm(dense(found.adapter, site).numpy() - mean) / np.linalg.norm(mean))
    assert found.diagnostics["residual"] == pytest.approx(np.mean(residuals), abs=1e-5)


def test_fedit_refuses_mixed_ranks_with_a_way_out():
    with pytest.raises(AntherError, match=r"got \[2, 4\]: use strategy=exact"):
        FedIT().aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(2, 2), 1.0)], round=1)


@pytest.mark.parametrize("rule", [FedIT(), Exact(rank=4, max_rank=None, seed=0)], ids=["fedit", "exact"])
def test_programmer_errors(rule):
    with pytest.raises(ValueError, match="nothing to aggregate"):
        rule.aggregate(random_adapter(4, 0), [], round=1)
    with pytest.raises(ValueError, match="must be over 0"):
        rule.aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 0.0)], round=1)


def test_a_cap_below_the_trained_rank_is_refused():
    with pytest.raises(AntherError, match=r"max_rank=2: must be at least adapter\.shared\.rank=4"):
        Exact(rank=4, max_rank=2, seed=0)


def test_residual_of_products():
    a, b, c, d = (torch.randn(*shape, dtype=torch.float64) for shape in [(2, 5), (4, 2), (3, 5), (4, 3)])
    wanted = torch.linalg.norm(b @ a - d @ c) / torch.linalg.norm(d @ c)
    assert relative_residual(a, b, c, d) == pytest.approx(float(wanted))
