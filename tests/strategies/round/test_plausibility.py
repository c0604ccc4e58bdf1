"""Bounds on values that devices report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from strategies.round.plausibility import (
    MAX_COST_RATIO,
    MAX_MEDIAN_RATIO,
    STARTUP_SECONDS,
    cap_to_median,
    plausible_cost,
    trimmed_mean,
)
from tests.helpers.fleet import PLAN, REPORT, SITES

TRAINING = PLAN.steps * PLAN.batch_size / REPORT.examples_per_second  # 4 s
NUMBERS = PLAN.rank * (6 + 5 + 4 + 7)
MAX_SECONDS = STARTUP_SECONDS + MAX_COST_RATIO * (TRAINING + 4 * NUMBERS * 8e-6 / REPORT.uplink_mbps)


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([], None),
        ([3.0], 3.0),
        ([1.0, 4.0], 2.5),
        ([1e12, 1.0, 2.0], 2.0),
        ([0.0, 1.0, 3.0, 9e9], 2.0),
        ([*map(float, range(19)), 1e12], 9.5),
    ],
)
def test_trimmed_mean(values: list[float], mean: float | None) -> None:
    assert trimmed_mean(values) == mean


def test_cost_is_limited_by_plan_and_elapsed_time() -> None:
    def accepted(seconds: float, joules: float, elapsed: float | None = None) -> tuple[float, float]:
        return plausible_cost(REPORT, PLAN, (seconds, joules), sites=SITES, elapsed=elapsed)

    assert accepted(4.0, 20.0) == (4.0, 20.0)
    assert accepted(1e12, 1e12) == pytest.approx((MAX_SECONDS, MAX_SECONDS * REPORT.watts))
    assert accepted(1e12, 1e12, elapsed=7.0) == pytest.approx((7.0, 7.0 * REPORT.watts))
    assert accepted(4.0, 20.0, elapsed=7.0) == (4.0, 20.0)


def test_values_are_capped_to_the_median() -> None:
    honest = [float(value) for value in range(1, 20)]
    assert cap_to_median([*honest, 1e12]) == [*honest, MAX_MEDIAN_RATIO * 10.5]
    assert cap_to_median([1.0, 1e12]) == [1.0, 1e12]  # of two values, either may be false
    assert cap_to_median([]) == []


def test_slow_device_has_a_higher_limit() -> None:
    slow = replace(REPORT, examples_per_second=REPORT.examples_per_second / 100)
    assert plausible_cost(slow, PLAN, (500.0, 0.0), sites=SITES, elapsed=None) == (500.0, 0.0)
