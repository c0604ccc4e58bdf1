"""Goodness-of-fit tests: p-values are valid, and each kind of broken noise is detected."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from privacy.audit import goodness_of_fit as fit

SIGNIFICANCE = 1e-8


def normal_numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def smallest_p_value(releases: list[np.ndarray]) -> fit.Check:
    return min(fit.battery(releases), key=lambda check: check.p_value)


def test_battery_accepts_standard_normal_numbers() -> None:
    checks = fit.battery(list(normal_numbers(8, 4096)))
    assert {check.name for check in checks} == {
        "distribution",
        "variance",
        "extremes",
        "autocorrelation",
        "of the squares",
        "between releases",
    }
    assert min(check.p_value for check in checks) > 1e-3


@pytest.mark.integration
def test_p_values_are_valid() -> None:
    """Of 400 honest sets each, 1 % may have p < 0.01; 13 is 4.5 standard deviations more."""
    small = dict.fromkeys((check.name for check in fit.battery(list(normal_numbers(2, 200)))), 0)
    for seed in range(400):
        for check in fit.battery(list(normal_numbers(2, 200, seed=seed))):
            small[check.name] += check.p_value < 0.01
    assert max(small.values()) <= 13


def repeat_first_half(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[: len(x) // 2], x[: len(x) // 2]])


def repeat_with_random_signs(x: np.ndarray) -> np.ndarray:
    signs = np.random.default_rng(1).choice([-1.0, 1.0], len(x))
    return repeat_first_half(x) * signs


_LAGS = "autocorrelation"
BROKEN: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "3 % low": (lambda x: 0.97 * x, "variance"),
    "3 % high": (lambda x: 1.03 * x, "variance"),
    "shifted": (lambda x: x + 0.03, "distribution"),
    "uniform": (lambda x: math.sqrt(12) * (stats.norm.cdf(x) - 0.5), "distribution"),
    "tails cut off": (lambda x: np.clip(x, -2.8, 2.8), "extremes"),
    "one number far too large": (lambda x: np.concatenate([[9.0], x[1:]]), "extremes"),
    "second half a copy": (repeat_first_half, _LAGS),
    "second half a copy reversed in sign": (lambda x: np.concatenate([x[: len(x) // 2], -x[: len(x) // 2]]), _LAGS),
    "second half a copy with random signs": (repeat_with_random_signs, "of the squares"),
    "repeated every 4096": (lambda x: np.resize(x[:4096], len(x)), _LAGS),
    "each number twice": (lambda x: np.repeat(x[: len(x) // 2], 2), _LAGS),
    "a tenth common to neighbors": (lambda x: math.sqrt(0.9) * x + math.sqrt(0.1) * np.roll(x, 1), _LAGS),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_noise_is_detected_by_its_test(name: str) -> None:
    breaks, finder = BROKEN[name]
    result = {check.name: check.p_value for check in fit.battery([breaks(normal_numbers(2**16))])}
    assert result[finder] < SIGNIFICANCE


def test_repeated_release_is_detected() -> None:
    one, other = normal_numbers(2, 500)
    assert smallest_p_value([one, other]).p_value > 1e-3
    for again in (one, -one, 0.6 * one + 0.8 * other):
        result = {check.name: check.p_value for check in fit.battery([one, again])}
        assert result["between releases"] < SIGNIFICANCE


def test_infinite_numbers_are_rejected() -> None:
    x = normal_numbers(500)
    x[3] = np.inf
    assert smallest_p_value([x]).p_value == 0


@pytest.mark.parametrize("lag", [1, 2, 400])
def test_product_bound_is_valid_and_tight(lag: int) -> None:
    """P(Σ x_i x_{i+k} ≥ s), estimated by 40,000 draws, is below the bound, and the bound is below 20 times it."""
    x = normal_numbers(40_000, 500, seed=lag)
    sums = np.einsum("ri,ri->r", x[:, lag:], x[:, :-lag])
    for tail in (0.1, 0.01, 0.001):
        threshold = float(np.quantile(sums, 1 - tail))
        assert tail < fit.products_p_value(threshold, 500 - lag) < 20 * tail
    assert fit.products_p_value(0.0, 100) == fit.products_p_value(-5.0, 100) == 1.0


def test_product_bound_of_two_numbers_is_tight() -> None:
    """For independent products E exp(t x y) = (1 − t²)^(−½); for paths it is larger, so the bound is above it."""
    for mean in (0.01, 0.1, 0.3):
        t = np.linspace(0, 0.999, 100_000)
        exact = math.exp(-1000 * float(np.max(t * mean + 0.5 * np.log1p(-(t**2)))))
        assert exact <= fit.products_p_value(1000 * mean, 1000) <= exact ** (0.8 if mean > 0.2 else 0.95)


@pytest.mark.parametrize("count", [10_000, 1_000_000])
def test_shortfall_is_detected_with_stated_power(count: int) -> None:
    low = 1 - fit.shortfall(count, SIGNIFICANCE, 0.999)
    critical = stats.chi2.ppf(SIGNIFICANCE / 2, count)
    assert stats.chi2.cdf(critical / low**2, count) == pytest.approx(0.999)
    assert fit.shortfall(4 * count, SIGNIFICANCE, 0.999) == pytest.approx((1 - low) / 2, rel=0.05)


def test_alignment_detects_an_added_direction() -> None:
    x, direction = list(normal_numbers(10, 1000)), list(normal_numbers(10, 1000, seed=1) > 1)
    v = [one.astype(float) for one in direction]
    assert fit.alignment(x, v, "").p_value > 1e-3
    assert fit.alignment([one + 0.2 * other for one, other in zip(x, v, strict=True)], v, "").p_value < SIGNIFICANCE
    assert fit.alignment(x, [0 * one for one in v], "").p_value == 1.0


def test_repeats_are_detected_anywhere() -> None:
    deviation = 2.0**12
    releases = [np.rint(deviation * one).astype(np.int64) for one in normal_numbers(4, 5000)]
    assert fit.repeats(releases, deviation).p_value == 1.0
    releases[3][4000:4008] = releases[0][17:25]
    assert fit.repeats(releases, deviation).p_value < SIGNIFICANCE
    releases[3][4003] += 1
    assert fit.repeats(releases, deviation).p_value == 1.0


@pytest.mark.parametrize("deviation", [0.3, 1.0, 1000.0])
def test_integers_transform_to_normal(deviation: float) -> None:
    integers = np.rint(deviation * normal_numbers(100_000)).astype(np.int64)
    result = fit.normal_from_integers(integers, deviation, np.random.default_rng(1))
    assert smallest_p_value([result]).p_value > 1e-3
    assert (
        smallest_p_value([fit.normal_from_integers(integers, 1.05 * deviation, np.random.default_rng(1))]).p_value
        < SIGNIFICANCE
    )
    assert np.sign(result[integers != 0]) == pytest.approx(np.sign(integers[integers != 0]))


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_poisson_batches_transform_to_normal(rate: float) -> None:
    generator = np.random.default_rng(0)
    joined = generator.random((300, 200)) < rate
    assert smallest_p_value(list(fit.normal_from_membership(joined, rate, generator))).p_value > 1e-3
    assert fit.distribution(fit.normal_from_batch_sizes(joined.sum(1), 200, rate, generator)).p_value > 1e-3


@pytest.mark.parametrize("count", [3, 200])
def test_fixed_batch_sizes_are_detected(count: int) -> None:
    generator = np.random.default_rng(0)
    sizes = np.full(300, round(0.3 * count))
    assert fit.distribution(fit.normal_from_batch_sizes(sizes, count, 0.3, generator)).p_value < SIGNIFICANCE


def test_nonempty_and_repeated_batches_are_detected() -> None:
    generator = np.random.default_rng(0)
    joined = generator.random((400, 3)) < 0.2
    never = np.maximum(joined.sum(1), 1)
    assert fit.distribution(fit.normal_from_batch_sizes(never, 3, 0.2, generator)).p_value < SIGNIFICANCE
    joined = generator.random((40, 200)) < 0.2
    joined[20:] = joined[:20]
    assert smallest_p_value(list(fit.normal_from_membership(joined, 0.2, generator))).p_value < SIGNIFICANCE
