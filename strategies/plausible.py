"""Bounds on what devices tell of themselves, so that one that lies moves a total by no more than a few honest ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from models.adapter import Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning import seconds_per_step, transfers

TIMES = 10.0
"""A device may take so many times what its plan should cost it: it may be hot, or in use."""
START = 60.0  # seconds that it may take to begin
OTHERS = 20.0
"""In a real federation what a device tells counts up to so many times the median of its round."""


def trimmed_mean(values: Sequence[float]) -> float | None:
    """The mean without the largest and smallest tenth, and at least one of each where there are three or more.

    None of nothing. It lies within the range of the honest values if fewer are false than are left out at one end.

    References:
        Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 2.
    """
    cut = max(1, len(values) // 10) if len(values) >= 3 else 0
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept) if kept else None


def cost(
    report: DeviceReport, plan: TrainingPlan, told: tuple[float, float], *, sites: Sites, elapsed: float | None
) -> tuple[float, float]:
    """Seconds and joules that are believed of a device.

    Args:
        told: by it.
        elapsed: seconds since it was asked; None: a simulated device's seconds are not the server's.
    """
    seconds, joules = told
    work = plan.steps * seconds_per_step(report, plan) + transfers(report, plan, sites=sites, download=0)
    most = min([START + TIMES * work, *([] if elapsed is None else [elapsed])])
    return min(seconds, most), min(joules, most * report.watts)


def among_others(values: Sequence[float]) -> list[float]:
    """Each value, held to a multiple of their median where there are three or more."""
    if len(values) < 3:
        return list(values)
    most = OTHERS * median(values)
    return [min(value, most) for value in values]
