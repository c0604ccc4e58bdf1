"""Tests of paired statistics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from bench.lib.paired import bootstrap_interval, first_reached, mean, ratio

RNG = np.random.default_rng(1)


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = RNG.normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean(values) == (values.mean(), *bootstrap_interval(values))


def test_ratio_of_proportional_values_has_no_interval() -> None:
    """People differ, but the ratio is the same for each: only a paired interval is a point."""
    references = RNG.uniform(0.5, 2, 50)
    assert ratio(1.3 * references, references) == pytest.approx((1.3, 1.3, 1.3))


def test_interval_of_a_ratio_follows_the_delta_method() -> None:
    """The variance of a ratio r of means is that of the mean of (x − r y) / E[y] (Cochran, 1977, equation 6.13)."""
    references = RNG.normal(1, 0.2, 500)
    values = 1.5 * references + RNG.normal(0, 0.3, 500)
    value, low, high = ratio(values, references)
    assert value == pytest.approx(values.mean() / references.mean())
    half = 1.96 * (values - value * references).std() / references.mean() / 500**0.5
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.1)


def test_ratio_needs_the_same_people() -> None:
    with pytest.raises(ValueError, match="3 values, but 2 references"):
        ratio(np.ones(3), np.ones(2))


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((1.0, 0.8, 0.4), 0.6, 15.0),
        ((1.0, 0.8, 0.4), 0.3, None),
        ((0.5, 0.8, 0.4), 0.6, 0.0),
        ((1.0, 0.6, 0.9), 0.6, 10.0),
    ],
)
def test_first_reached(losses: tuple[float, ...], target: float, expected: float | None) -> None:
    reached = first_reached((0, 10, 20), losses, target)
    assert reached == (None if expected is None else pytest.approx(expected))
