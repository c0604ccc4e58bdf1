"""Trade-off functions, compared with closed forms and numerical integration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.stats import norm

from privacy.accounting import PoissonGaussian, epsilon
from privacy.audit import tradeoff

GRID = np.linspace(-40, 40, 40_001)


def reference_inverse(sigma: float, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute P(S) and the minimum of Q(S) for one step: half-lines in both orders, and mixtures of them."""
    steps = np.linspace(-10 * sigma, 1 + 10 * sigma, 20_001)
    without = norm.sf(steps, 0, sigma)
    having = (1 - q) * without + q * norm.sf(steps, 1, sigma)
    points = np.concatenate([np.stack([having, without], 1), np.stack([1 - without, 1 - having], 1)])
    hull = points[ConvexHull(points).vertices]
    lower = hull[np.argsort(hull[:, 0])]
    return lower[:, 0], lower[:, 1]


@pytest.mark.parametrize(("sigma", "q"), [(0.6, 0.2), (1.0, 0.5), (2.0, 0.9)])
def test_sampled_step_is_accurate_and_never_above(sigma: float, q: float) -> None:
    inverse = tradeoff.inverse(PoissonGaussian(noise_multiplier=sigma, sampling_rate=q, steps=1))
    known, least = reference_inverse(sigma, q)
    for y in (0.02, 0.1, 0.3, 0.6, 0.9, 0.99):
        exact = float(np.interp(y, known, least))
        assert exact - 2e-3 <= inverse(y) <= exact + 1e-5


@pytest.mark.integration
def test_full_sampling_steps_are_one_gaussian() -> None:
    inverse = tradeoff.inverse(PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=16))
    almost = tradeoff.inverse(PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.999999, steps=16))
    for y in (0.01, 0.2, 0.5, 0.9, 0.999):
        assert inverse(y) == pytest.approx(norm.cdf(norm.ppf(y) - 2.0))
        assert almost(y) == pytest.approx(inverse(y), abs=5e-3)
    assert inverse(0.0) == 0.0
    assert inverse(1.0) == 1.0


normals = st.tuples(st.floats(-3, 3), st.floats(0.1, 3))


@given(p=normals, q=normals, eps=st.floats(0, 3))
def test_hockey_stick_matches_the_integral(p: tuple[float, float], q: tuple[float, float], eps: float) -> None:
    excess = norm.pdf(GRID, *p) - math.exp(eps) * norm.pdf(GRID, *q)
    expected = float(np.clip(excess, 0, None).sum() * (GRID[1] - GRID[0]))
    assert tradeoff.hockey_stick(p, q, eps) == pytest.approx(expected, abs=2e-4)


def test_hockey_stick_of_equal_deviations_matches_accountant() -> None:
    value = epsilon([PoissonGaussian(noise_multiplier=1.5, sampling_rate=1.0, steps=1)], 1e-4).value
    assert tradeoff.hockey_stick((1.0, 1.5), (0.0, 1.5), value) == pytest.approx(1e-4, rel=0.02)
    assert tradeoff.hockey_stick((0.0, 1.5), (1.0, 1.5), value) == pytest.approx(1e-4, rel=0.02)


def test_hockey_stick_is_accurate_in_the_tails() -> None:
    """At ε = 300 the two terms are differences of huge numbers, unless each tail is computed by itself."""
    result = tradeoff.hockey_stick((1.0, 0.04), (0.0, 0.04), 300.0)
    expected = norm.sf((300 * 0.04**2 + 0.5 - 1) / 0.04) - math.exp(300) * norm.sf((300 * 0.04**2 + 0.5) / 0.04)
    assert result == pytest.approx(expected, rel=1e-6)
    assert 0 < result < 1
