"""Products in factored form against dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lora.adapter import Factors
from strategies.aggregation.factored import ProductSum, compress, mean_residual, pad, relative_residual, stacked_mean
from tests.helpers.means import best, close, distance


def terms(count, size, inputs, outputs, seed, drift=0.5):
    """Factors about one start, as devices' are, each the `count`-th part."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(size, inputs, generator=generator), torch.randn(outputs, size, generator=generator)
    for _ in range(count):
        to_a = a + drift * torch.randn(a.shape, generator=generator)
        yield to_a, (b + drift * torch.randn(b.shape, generator=generator)) / count


def summed(found, *, max_rank, seed=0):
    found = list(found)
    total = ProductSum(inputs=found[0][0].shape[1], outputs=len(found[0][1]), max_rank=max_rank, seed=seed)
    for a, b in found:
        total.add(a, b)
    return total, sum(b.double().numpy() @ a.double().numpy() for a, b in found)


shapes = st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=40, deadline=None)
@given(shapes, st.one_of(st.none(), st.integers(1, 7)), st.integers(0, 99))
def test_compressed_is_the_best_of_its_rank_with_orthonormal_rows(shape, max_rank, seed):
    size, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(size, inputs, generator=generator), torch.randn(outputs, size, generator=generator)
    found, whole = compress(a, b, max_rank), b.double().numpy() @ a.double().numpy()
    wanted = best(whole, min(size, inputs, outputs) if max_rank is None else max_rank)
    assert close(found.b.numpy() @ found.a.numpy(), wanted)
    assert np.allclose(found.a @ found.a.T, np.eye(len(found.a)))
    assert found.energy == pytest.approx((wanted**2).sum() / (whole**2).sum() if whole.any() else 1.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_no_more_directions_than_the_energy_needs(sigma, energy):
    a, b = torch.eye(8, dtype=torch.float64)[: len(sigma)], torch.eye(7, dtype=torch.float64)[:, : len(sigma)]
    found = compress(a, b * torch.tensor(sigma), None, energy)
    shares = (
        np.cumsum(np.sort(np.float32(sigma).astype(float) ** 2)[::-1]) / (np.float32(sigma).astype(float) ** 2).sum()
    )
    assert found.energy >= energy - 1e-9
    assert len(found.a) == 1 or shares[len(found.a) - 2] < energy + 1e-9


@pytest.mark.parametrize(("inputs", "outputs", "max_rank"), [(40, 30, None), (40, 30, 22), (20, 30, 12)])
def test_a_sum_of_any_length_is_exact_where_every_direction_has_room(inputs, outputs, max_rank):
    """A thousand directions go through a stack of 512, into matrices that have 20 or 30."""
    total, wanted = summed(terms(250, 4, inputs, outputs, seed=0), max_rank=max_rank)
    found = total.best(max_rank=None)
    assert close(found.b.numpy() @ found.a.numpy(), wanted)
    assert found.energy == 1.0


@pytest.mark.parametrize(("count", "size"), [(60, 4), (100, 8), (200, 8)])
@pytest.mark.parametrize("max_rank", [2, 8, 16])
def test_a_long_sum_is_near_the_best_of_its_rank_and_says_how_near(count, size, max_rank):
    total, wanted = summed(terms(count, size, 150, 120, seed=count), max_rank=max_rank)
    found = total.best(max_rank=max_rank)
    error = distance(found.b.numpy() @ found.a.numpy(), wanted)
    assert len(found.a) == max_rank
    assert error <= 1.05 * distance(best(wanted, max_rank), wanted)
    assert (1 - found.energy) ** 0.5 == pytest.approx(error, rel=0.3 if count * size > 256 else 1e-6)


def test_energy_counts_what_was_cut_on_the_way():
    """Of 300 equal directions half would be 150, and the 16 that may be kept are far from that."""
    q = torch.linalg.qr(torch.randn(400, 400, generator=torch.Generator().manual_seed(0))).Q
    total = ProductSum(inputs=400, outputs=400, max_rank=16, seed=0)
    for start in range(0, 300, 10):
        total.add(q[start : start + 10], q[:, start : start + 10])
    found = total.best(max_rank=16, energy=0.5)
    assert len(found.a) == 16
    assert found.energy == pytest.approx(16 / 300, rel=0.3)


@pytest.mark.parametrize("count", [60, 200, 560])
def test_rounding_on_the_way_is_no_direction(count):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 320, generator=generator)
    total = ProductSum(inputs=320, outputs=320, max_rank=64, seed=0)
    for _ in range(count):
        total.add(a, torch.randn(320, 8, generator=generator))
    assert len(total.best(max_rank=64).a) == 8


@pytest.mark.parametrize("max_rank", [None, 4])
def test_a_term_may_be_longer_than_the_stack(max_rank):
    total, wanted = summed(terms(2, 700, 30, 20, seed=0), max_rank=max_rank)
    found = total.best(max_rank=max_rank)
    error = distance(found.b.numpy() @ found.a.numpy(), wanted)
    assert error <= max(1e-5, 1.05 * distance(best(wanted, max_rank or 20), wanted))


def test_what_a_sum_holds_does_not_grow():
    """Numbers held by ten devices, and by a thousand."""

    def held(count):
        total, _ = summed(terms(count, 8, 150, 120, seed=0), max_rank=8)
        return sum(value.numel() for value in vars(total).values() if isinstance(value, torch.Tensor))

    assert held(1000) <= held(10) + 120 * 8


def test_a_sum_of_nothing():
    total = ProductSum(inputs=5, outputs=4, max_rank=2, seed=0)
    found = total.best(max_rank=2)
    assert (found.a.shape, found.b.shape, found.energy) == ((0, 5), (4, 0), 1.0)


def test_residual_of_products():
    a, b, c, d = (torch.randn(*shape, dtype=torch.float64) for shape in [(2, 5), (4, 2), (3, 5), (4, 3)])
    wanted = torch.linalg.norm(b @ a - d @ c) / torch.linalg.norm(d @ c)
    assert relative_residual(a, b, c, d) == pytest.approx(float(wanted))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_the_residual_of_a_mean_is_the_same_of_a_matrix_and_of_a_stack(ranks, seed):
    """Six devices of rank 3 have more directions than a site of 7 × 5."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(size):
        return Factors(torch.randn(size, 7, generator=generator), torch.randn(5, size, generator=generator))

    current, found, there = drawn(3), drawn(2), [(drawn(size), 1 / len(ranks)) for size in ranks]
    wanted = relative_residual(*found, *stacked_mean(current, there))
    assert mean_residual(found, current, there) == pytest.approx(wanted, rel=1e-6)


def test_padding_leaves_the_product_and_a_gradient():
    factors = Factors(torch.randn(2, 5), torch.randn(4, 2))
    a, b = pad(factors, 4, seed=1)
    assert torch.equal(b @ a, factors.b @ factors.a)
    assert (a.norm(dim=1) > 0.1).all()
