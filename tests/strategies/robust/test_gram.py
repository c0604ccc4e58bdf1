"""Inner products of changes by their factors, and what is made of them, against dense matrices in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lora.adapter import Factors
from strategies.robust import gram
from strategies.robust.gram import changes
from tests.helpers.means import SITES, dense, product, random_adapter, rounds


def trained(adapter, site):
    return site in adapter and len(adapter[site].a) > 0


def change(current, adapter, site):
    """C_k, zero where it trained nothing."""
    zero = np.zeros_like(dense(current, site))
    return product(current, adapter, site) - dense(current, site) if trained(adapter, site) else zero


def turned(adapter, seed):
    """The same products in other factors: B → B M, A → M⁻¹ A."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site, (a, b) in adapter.items():
        m = torch.linalg.qr(torch.randn(len(a), len(a), dtype=torch.float64, generator=generator)).Q * 3
        found[site] = Factors(torch.linalg.inv(m) @ a.double(), b.double() @ m)
    return found


@settings(max_examples=30, deadline=None)
@given(rounds())
def test_they_are_those_of_dense_matrices(round):
    current, updates = round
    found, grams = changes(current, updates), torch.zeros(len(current), len(updates), len(updates)).double()
    for place, site in enumerate(current):
        flat = np.stack([change(current, adapter, site).ravel() for adapter, _ in updates])
        gram = torch.from_numpy(flat @ flat.T)
        grams[found.groups[place]] += gram
        assert torch.allclose(found.squares[place], gram.diagonal(), rtol=1e-9, atol=1e-9)
        assert found.trained[place].tolist() == [trained(adapter, site) for adapter, _ in updates]
    assert torch.allclose(found.gram, grams[: len(found.gram)], rtol=1e-9, atol=1e-9)
    assert len(found.gram) == len({tuple(those) for those in found.trained.tolist()})
    assert found.weights.tolist() == [weight for _, weight in updates]


@settings(max_examples=30, deadline=None)
@given(rounds())
def test_how_a_product_is_factored_is_nothing_to_them(round):
    current, updates = round
    other = [(turned(adapter, number), weight) for number, (adapter, weight) in enumerate(updates)]
    assert torch.allclose(changes(current, other).gram, changes(current, updates).gram, rtol=1e-5, atol=1e-5)


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    current, updates = random_adapter(4, 0), [(random_adapter(size, size), 1.0) for size in (4, 2, 3)]
    wanted = changes(current, updates).gram
    monkeypatch.setattr(gram, "_ROWS", 3)
    assert torch.allclose(changes(current, updates).gram, wanted, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_norms_and_distances_of_who_trained_everything_are_the_true_ones(seed, devices):
    current = random_adapter(4, seed)
    updates = [(random_adapter(1 + number % 4, seed + 1 + number), 1.0) for number in range(devices)]
    flat = np.stack(
        [np.concatenate([change(current, adapter, site).ravel() for site in SITES]) for adapter, _ in updates]
    )
    found = changes(current, updates)
    assert np.allclose(found.norms(), np.linalg.norm(flat, axis=1), rtol=1e-6)
    apart = np.linalg.norm(flat[:, None] - flat, axis=2)
    assert np.allclose(found.distances(), apart, rtol=1e-6, atol=1e-5)


def test_part_of_the_sites_stands_for_all_of_them():
    """A device that moves as the others do, where it trains, is as far from anybody as one that trains everything."""
    current, moved = random_adapter(4, 0), random_adapter(4, 1)
    half = {"x": moved["x"]}
    found = changes(current, [(moved, 1.0), (half, 1.0), (current, 1.0), ({"y": moved["y"]}, 1.0)])
    norms, apart = found.norms(), found.distances()
    assert norms[1] == pytest.approx(float(norms[0]), rel=1e-6)
    assert apart[1, 2] == pytest.approx(float(apart[0, 2]), rel=1e-6)
    assert apart[0, 1] == pytest.approx(0.0, abs=1e-4)
    assert apart[1, 3].isnan()


def test_nobody_moved_or_trained():
    current = random_adapter(4, 0)
    still = changes(current, [(current, 1.0)] * 3)
    assert not still.norms().any()
    assert not still.distances().any()
    nothing = changes(current, [(random_adapter(0, 1), 1.0), ({}, 1.0)])
    assert not nothing.trained.any()
    assert not nothing.gram.any()
    assert nothing.norms().isnan().all()


def site_by_site(current, updates):
    """Norms, distances and cosines of sums over the Gram matrices of single sites, K² numbers of each."""
    grams = torch.stack(
        [gram.inner_products(site, [adapter.get(name) for adapter, _ in updates]) for name, site in current.items()]
    )
    known = torch.tensor([[trained(adapter, site) for adapter, _ in updates] for site in current])
    squares = grams.diagonal(dim1=1, dim2=2)
    typical = squares.masked_fill(~known, float("nan")).nanmedian(dim=1).values.nan_to_num()
    typical = typical if typical.any() else known.any(dim=1).to(typical)

    def whole(values, where):
        typically = typical.view(-1, *[1] * (where.dim() - 1))
        return (values.clamp(min=0) * where).sum(0) * typical.sum() / (typically * where).sum(0)

    both = known[:, :, None] & known[:, None]
    norms = (squares[:, :, None] * both).sum(0).sqrt()
    return {
        "norms": whole(squares, known).sqrt(),
        "distances": whole(squares[:, :, None] + squares[:, None] - 2 * grams, both).sqrt(),
        "cosines": (grams.sum(0) / (norms * norms.T)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
    }


@settings(max_examples=40, deadline=None)
@given(rounds())
def test_sums_over_groups_of_sites_are_those_over_single_ones(round):
    """Also of some devices alone, and of scaled changes."""
    current, updates = round
    found = changes(current, updates)
    some = list(range(0, len(updates), 2))
    half = {site: Factors(f.a, f.b) for site, f in current.items()}
    for given_, wanted in (
        (found, site_by_site(current, updates)),
        (found.among(torch.tensor(some)), site_by_site(half, [updates[place] for place in some])),
    ):
        scale = float(given_.squares.max()) ** 0.5
        for name, value in wanted.items():
            close = 1e-6 * (scale if name != "cosines" else 1)
            assert torch.allclose(getattr(given_, name)(), value, rtol=1e-6, atol=close, equal_nan=True)
    doubled, twice = found.scaled(torch.full((len(updates),), 2.0).double()), found.norms()
    assert torch.allclose(doubled.norms(), 2 * twice, equal_nan=True)


def test_room_grows_with_the_sets_of_devices_and_not_with_sites():
    current = {f"{site}{copy}": factors for copy in range(20) for site, factors in random_adapter(4, 0).items()}
    whole = {f"{site}{copy}": factors for copy in range(20) for site, factors in random_adapter(4, 1).items()}
    half = {site: factors for site, factors in whole.items() if int(site[1:]) < 10}
    found = changes(current, [(whole, 1.0), (half, 1.0), (whole, 1.0)])
    assert found.gram.shape == (2, 3, 3)
    assert found.squares.shape == (len(current), 3)
