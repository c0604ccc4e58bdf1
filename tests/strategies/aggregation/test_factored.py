"""Products in factored form against dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors
from strategies.aggregation.factored import ProductSum, compress, mean_residual, pad, relative_residual, stacked_mean
from tests.helpers.means import best, close, distance


def terms(count, size, inputs, outputs, seed, drift=0.5):
    """Yield factors near a common start, like those of devices, each with weight 1 / `count`."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(size, inputs, generator=generator), torch.randn(outputs, size, generator=generator)
    for _ in range(count):
        to_a = a + drift * torch.randn(a.shape, generator=generator)
        yield to_a, (b + drift * torch.randn(b.shape, generator=generator)) / count


def accumulate(result, *, max_rank, seed=0):
    result = list(result)
    total = ProductSum(inputs=result[0][0].shape[1], outputs=len(result[0][1]), max_rank=max_rank, seed=seed)
    for a, b in result:
        total.add(a, b)
    return total, sum(b.double().numpy() @ a.double().numpy() for a, b in result)


shapes = st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9))


@given(shapes, st.one_of(st.none(), st.integers(1, 7)), st.integers(0, 99))
def test_compress_gives_the_best_low_rank_product(shape, max_rank, seed):
    size, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(size, inputs, generator=generator), torch.randn(outputs, size, generator=generator)
    result, full = compress(a, b, max_rank), b.double().numpy() @ a.double().numpy()
    expected = best(full, min(size, inputs, outputs) if max_rank is None else max_rank)
    assert close(result.b.numpy() @ result.a.numpy(), expected)
    assert np.allclose(result.a @ result.a.T, np.eye(len(result.a)))
    assert result.energy == pytest.approx((expected**2).sum() / (full**2).sum() if full.any() else 1.0)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_energy_limits_the_directions(sigma, energy):
    a, b = torch.eye(8, dtype=torch.float64)[: len(sigma)], torch.eye(7, dtype=torch.float64)[:, : len(sigma)]
    result = compress(a, b * torch.tensor(sigma), None, energy)
    fractions = (
        np.cumsum(np.sort(np.float32(sigma).astype(float) ** 2)[::-1]) / (np.float32(sigma).astype(float) ** 2).sum()
    )
    assert result.energy >= energy - 1e-9
    assert len(result.a) == 1 or fractions[len(result.a) - 2] < energy + 1e-9


@pytest.mark.parametrize(("inputs", "outputs", "max_rank"), [(40, 30, None), (40, 30, 22), (20, 30, 12)])
def test_sum_is_exact_if_every_direction_fits(inputs, outputs, max_rank):
    """A thousand directions pass through a stack of 512, for matrices with 20 or 30."""
    total, expected = accumulate(terms(250, 4, inputs, outputs, seed=0), max_rank=max_rank)
    result = total.best(max_rank=None)
    assert close(result.b.numpy() @ result.a.numpy(), expected)
    assert result.energy == 1.0


@pytest.mark.parametrize(("count", "size"), [(60, 4), (100, 8), (200, 8)])
@pytest.mark.parametrize("max_rank", [2, 8, 16])
def test_long_sum_is_near_the_best_and_estimates_its_error(count, size, max_rank):
    total, expected = accumulate(terms(count, size, 150, 120, seed=count), max_rank=max_rank)
    result = total.best(max_rank=max_rank)
    error = distance(result.b.numpy() @ result.a.numpy(), expected)
    assert len(result.a) == max_rank
    assert error <= 1.05 * distance(best(expected, max_rank), expected)
    assert (1 - result.energy) ** 0.5 == pytest.approx(error, rel=0.3 if count * size > 256 else 1e-6)


def test_energy_includes_intermediate_truncation():
    """Half of 300 equal directions would be 150; the 16 that are kept have far less energy."""
    q = torch.linalg.qr(torch.randn(400, 400, generator=torch.Generator().manual_seed(0))).Q
    total = ProductSum(inputs=400, outputs=400, max_rank=16, seed=0)
    for start in range(0, 300, 10):
        total.add(q[start : start + 10], q[:, start : start + 10])
    result = total.best(max_rank=16, energy=0.5)
    assert len(result.a) == 16
    assert result.energy == pytest.approx(16 / 300, rel=0.3)


@pytest.mark.parametrize("count", [60, 200, 560])
def test_rounding_adds_no_direction(count):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 320, generator=generator)
    total = ProductSum(inputs=320, outputs=320, max_rank=64, seed=0)
    for _ in range(count):
        total.add(a, torch.randn(320, 8, generator=generator))
    assert len(total.best(max_rank=64).a) == 8


@pytest.mark.parametrize("max_rank", [None, 4])
def test_term_longer_than_the_stack(max_rank):
    total, expected = accumulate(terms(2, 700, 30, 20, seed=0), max_rank=max_rank)
    result = total.best(max_rank=max_rank)
    error = distance(result.b.numpy() @ result.a.numpy(), expected)
    assert error <= max(1e-5, 1.05 * distance(best(expected, max_rank or 20), expected))


def test_memory_of_a_sum_does_not_grow():
    """Compare the stored numbers for ten and for a thousand devices."""

    def stored_numbers(count):
        total, _ = accumulate(terms(count, 8, 150, 120, seed=0), max_rank=8)
        return sum(value.numel() for value in vars(total).values() if isinstance(value, torch.Tensor))

    assert stored_numbers(1000) <= stored_numbers(10) + 120 * 8


def test_empty_sum():
    total = ProductSum(inputs=5, outputs=4, max_rank=2, seed=0)
    result = total.best(max_rank=2)
    assert (result.a.shape, result.b.shape, result.energy) == ((0, 5), (4, 0), 1.0)


def test_residual_of_products():
    a, b, c, d = (torch.randn(*shape, dtype=torch.float64) for shape in [(2, 5), (4, 2), (3, 5), (4, 3)])
    expected = torch.linalg.norm(b @ a - d @ c) / torch.linalg.norm(d @ c)
    assert relative_residual(a, b, c, d) == pytest.approx(float(expected))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_residual_is_equal_for_matrix_and_stack(ranks, seed):
    """Six devices of rank 3 have more directions than a 7 × 5 site."""
    generator = torch.Generator().manual_seed(seed)

    def random_factors(size):
        return Factors(torch.randn(size, 7, generator=generator), torch.randn(5, size, generator=generator))

    current, result, updates = (
        random_factors(3),
        random_factors(2),
        [(random_factors(size), 1 / len(ranks)) for size in ranks],
    )
    expected = relative_residual(*result, *stacked_mean(current, updates))
    assert mean_residual(result, current, updates) == pytest.approx(expected, rel=1e-6)


def test_padding_keeps_product_and_gradient():
    factors = Factors(torch.randn(2, 5), torch.randn(4, 2))
    a, b = pad(factors, 4, seed=1)
    assert torch.equal(b @ a, factors.b @ factors.a)
    assert (a.norm(dim=1) > 0.1).all()
