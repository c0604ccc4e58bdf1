"""Inner products, norms and distances of changes against dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors
from strategies.robust import gram
from strategies.robust.gram import changes
from tests.helpers.means import SITES, dense, product, random_adapter, rounds


def trained(adapter, site):
    return site in adapter and len(adapter[site].a) > 0


def change(current, adapter, site):
    """Compute C_k, zero for an untrained site."""
    zero = np.zeros_like(dense(current, site))
    return product(current, adapter, site) - dense(current, site) if trained(adapter, site) else zero


def refactored(adapter, seed):
    """Refactor the same products: B → B M, A → M⁻¹ A."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for site, (a, b) in adapter.items():
        m = torch.linalg.qr(torch.randn(len(a), len(a), dtype=torch.float64, generator=generator)).Q * 3
        result[site] = Factors(torch.linalg.inv(m) @ a.double(), b.double() @ m)
    return result


@given(rounds())
def test_inner_products_match_dense_matrices(round):
    current, updates = round
    result, grams = changes(current, updates), torch.zeros(len(current), len(updates), len(updates)).double()
    for index, site in enumerate(current):
        flat = np.stack([change(current, adapter, site).ravel() for adapter, _ in updates])
        gram = torch.from_numpy(flat @ flat.T)
        grams[result.groups[index]] += gram
        assert torch.allclose(result.squares[index], gram.diagonal(), rtol=1e-9, atol=1e-9)
        assert result.trained[index].tolist() == [trained(adapter, site) for adapter, _ in updates]
    assert torch.allclose(result.gram, grams[: len(result.gram)], rtol=1e-9, atol=1e-9)
    assert len(result.gram) == len({tuple(devices) for devices in result.trained.tolist()})
    assert result.weights.tolist() == [weight for _, weight in updates]


@given(rounds())
def test_factorization_does_not_matter(round):
    current, updates = round
    other = [(refactored(adapter, number), weight) for number, (adapter, weight) in enumerate(updates)]
    assert torch.allclose(changes(current, other).gram, changes(current, updates).gram, rtol=1e-5, atol=1e-5)


def test_blocks_of_rows_give_the_same_result(monkeypatch):
    current, updates = random_adapter(4, 0), [(random_adapter(size, size), 1.0) for size in (4, 2, 3)]
    expected = changes(current, updates).gram
    monkeypatch.setattr(gram, "_ROWS", 3)
    assert torch.allclose(changes(current, updates).gram, expected, rtol=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_norms_and_distances_match_dense_vectors(seed, devices):
    current = random_adapter(4, seed)
    updates = [(random_adapter(1 + number % 4, seed + 1 + number), 1.0) for number in range(devices)]
    flat = np.stack(
        [np.concatenate([change(current, adapter, site).ravel() for site in SITES]) for adapter, _ in updates]
    )
    result = changes(current, updates)
    assert np.allclose(result.norms(), np.linalg.norm(flat, axis=1), rtol=1e-6)
    distances = np.linalg.norm(flat[:, None] - flat, axis=2)
    assert np.allclose(result.distances(), distances, rtol=1e-6, atol=1e-5)


def test_partial_updates_are_extrapolated():
    """A device that trains some sites like another one is as far from the others as a device that trains all sites."""
    current, moved = random_adapter(4, 0), random_adapter(4, 1)
    half = {"x": moved["x"]}
    result = changes(current, [(moved, 1.0), (half, 1.0), (current, 1.0), ({"y": moved["y"]}, 1.0)])
    norms, distances = result.norms(), result.distances()
    assert norms[1] == pytest.approx(float(norms[0]), rel=1e-6)
    assert distances[1, 2] == pytest.approx(float(distances[0, 2]), rel=1e-6)
    assert distances[0, 1] == pytest.approx(0.0, abs=1e-4)
    assert distances[1, 3].isnan()


def test_unchanged_and_untrained_updates():
    current = random_adapter(4, 0)
    still = changes(current, [(current, 1.0)] * 3)
    assert not still.norms().any()
    assert not still.distances().any()
    untrained = changes(current, [(random_adapter(0, 1), 1.0), ({}, 1.0)])
    assert not untrained.trained.any()
    assert not untrained.gram.any()
    assert untrained.norms().isnan().all()


def site_by_site(current, updates):
    """Compute norms, distances and cosines from the Gram matrix of each site."""
    grams = torch.stack(
        [gram.inner_products(site, [adapter.get(name) for adapter, _ in updates]) for name, site in current.items()]
    )
    was_trained = torch.tensor([[trained(adapter, site) for adapter, _ in updates] for site in current])
    squares = grams.diagonal(dim1=1, dim2=2)
    typical = squares.masked_fill(~was_trained, float("nan")).nanmedian(dim=1).values.nan_to_num()
    typical = typical if typical.any() else was_trained.any(dim=1).to(typical)

    def extrapolate(values, where):
        typically = typical.view(-1, *[1] * (where.dim() - 1))
        return (values.clamp(min=0) * where).sum(0) * typical.sum() / (typically * where).sum(0)

    both = was_trained[:, :, None] & was_trained[:, None]
    norms = (squares[:, :, None] * both).sum(0).sqrt()
    return {
        "norms": extrapolate(squares, was_trained).sqrt(),
        "distances": extrapolate(squares[:, :, None] + squares[:, None] - 2 * grams, both).sqrt(),
        "cosines": (grams.sum(0) / (norms * norms.T)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
    }


@given(rounds())
def test_groups_match_single_sites(round):
    """Includes subsets of devices and scaled changes."""
    current, updates = round
    result = changes(current, updates)
    some = list(range(0, len(updates), 2))
    half = {site: Factors(f.a, f.b) for site, f in current.items()}
    for geometry, expected in (
        (result, site_by_site(current, updates)),
        (result.subset(torch.tensor(some)), site_by_site(half, [updates[index] for index in some])),
    ):
        scale = float(geometry.squares.max()) ** 0.5
        for name, value in expected.items():
            close = 1e-6 * (scale if name != "cosines" else 1)
            assert torch.allclose(getattr(geometry, name)(), value, rtol=1e-6, atol=close, equal_nan=True)
    doubled = result.scaled(torch.full((len(updates),), 2.0).double())
    assert torch.allclose(doubled.norms(), 2 * result.norms(), equal_nan=True)


def test_memory_depends_on_groups_not_on_sites():
    current = {f"{site}{copy}": factors for copy in range(20) for site, factors in random_adapter(4, 0).items()}
    full = {f"{site}{copy}": factors for copy in range(20) for site, factors in random_adapter(4, 1).items()}
    half = {site: factors for site, factors in full.items() if int(site[1:]) < 10}
    result = changes(current, [(full, 1.0), (half, 1.0), (full, 1.0)])
    assert result.gram.shape == (2, 3, 3)
    assert result.squares.shape == (len(current), 3)
