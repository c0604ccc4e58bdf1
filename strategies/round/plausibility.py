"""Bounds on self-reported values of devices, so that a lying device moves a total no more than a few honest ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from models.lora.adapter import Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning.plan import seconds_per_step, transfer_seconds
from training.round_work import steps_per_round

MAX_COST_RATIO = 10.0
"""Largest accepted multiple of the expected cost of a device's plan: the device may be hot, or in use."""
STARTUP_SECONDS = 60.0  # accepted time for a device to start
MAX_MEDIAN_RATIO = 20.0
"""In a real federation, a reported value is capped at this multiple of its round's median."""


def trimmed_mean(values: Sequence[float]) -> float | None:
    """Compute the mean without the largest and smallest tenth (at least one each, if there are three or more values).

    Empty input gives None. If fewer values are false than are removed at one end, the mean lies within the range of the
    honest values.

    References:
        Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 2.
    """
    cut = max(1, len(values) // 10) if len(values) >= 3 else 0
    remaining = sorted(values)[cut : len(values) - cut]
    return sum(remaining) / len(remaining) if remaining else None


def plausible_cost(
    report: DeviceReport, plan: TrainingPlan, reported: tuple[float, float], *, sites: Sites, elapsed: float | None
) -> tuple[float, float]:
    """Return the accepted seconds and joules of a device.

    Args:
        report: report of the device.
        plan: plan that it trained.
        reported: seconds and joules that the device reported.
        sites: sites of the adapter.
        elapsed: seconds since the request; None for a simulated device, whose seconds are not the server's.
    """
    seconds, joules = reported
    work = steps_per_round(plan) * seconds_per_step(report, plan) + transfer_seconds(
        report, plan, sites=sites, download=0
    )
    limit = min([STARTUP_SECONDS + MAX_COST_RATIO * work, *([] if elapsed is None else [elapsed])])
    return min(seconds, limit), min(joules, limit * report.watts)


def cap_to_median(values: Sequence[float]) -> list[float]:
    """Cap each value at a multiple of their median, if there are three or more."""
    if len(values) < 3:
        return list(values)
    limit = MAX_MEDIAN_RATIO * median(values)
    return [min(value, limit) for value in values]
