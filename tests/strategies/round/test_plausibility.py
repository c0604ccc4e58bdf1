"""What is believed of what devices tell."""

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
MOST = STARTUP_SECONDS + MAX_COST_RATIO * (TRAINING + 4 * NUMBERS * 8e-6 / REPORT.uplink_mbps)


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
def test_the_ends_are_left_out(values: list[float], mean: float | None) -> None:
    assert trimmed_mean(values) == mean


def test_a_device_takes_no_more_than_its_plan_and_the_time_that_passed() -> None:
    def believed(seconds: float, joules: float, elapsed: float | None = None) -> tuple[float, float]:
        return plausible_cost(REPORT, PLAN, (seconds, joules), sites=SITES, elapsed=elapsed)

    assert believed(4.0, 20.0) == (4.0, 20.0)
    assert believed(1e12, 1e12) == pytest.approx((MOST, MOST * REPORT.watts))
    assert believed(1e12, 1e12, elapsed=7.0) == pytest.approx((7.0, 7.0 * REPORT.watts))
    assert believed(4.0, 20.0, elapsed=7.0) == (4.0, 20.0)


def test_one_among_many_counts_for_a_few() -> None:
    honest = [float(value) for value in range(1, 20)]
    assert cap_to_median([*honest, 1e12]) == [*honest, MAX_MEDIAN_RATIO * 10.5]
    assert cap_to_median([1.0, 1e12]) == [1.0, 1e12]  # of two nobody knows which one is right
    assert cap_to_median([]) == []


def test_a_slow_device_has_longer() -> None:
    slow = replace(REPORT, examples_per_second=REPORT.examples_per_second / 100)
    assert plausible_cost(slow, PLAN, (500.0, 0.0), sites=SITES, elapsed=None) == (500.0, 0.0)
