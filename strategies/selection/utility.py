"""Oort's utility of a device (Lai et al., OSDI 2021, §4): what its loss promises, by how long it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from strategies.selection import DeviceCandidate


def statistical_utility(one: DeviceCandidate) -> float | None:
    """U = |B| √(Σ loss² / |B|), eq. 1; None where no loss was told.

    Of the examples B that it would train on, with the mean of their losses in the place of the root of their mean
    square: devices tell no more, and it is never larger.
    """
    return None if one.loss is None else one.plan.steps * one.plan.batch_size * one.loss


def unit_range(values: Sequence[float], clip: float) -> list[float]:
    """The values, cut at their quantile `clip` and moved to lie from 0 to 1; equal ones are 0."""
    if not values:
        return []
    ordered = sorted(values)
    high = ordered[min(int(len(ordered) * clip), len(ordered) - 1)]
    low = ordered[0]
    return [(min(value, high) - low) / (high - low) if high > low else 0.0 for value in values]


def staleness_bonus(round: int, last: int) -> float:
    """√(0.1 ln R / L) of a device that was asked last in round L, algorithm 1: it grows with the rounds since."""
    return math.sqrt(0.1 * math.log(round) / last)


def system_utility(seconds: float, preferred: float, alpha: float) -> float:
    """(T / t)^α for a device that takes t, longer than the preferred T, and 1 for any other: eq. 1."""
    return (preferred / seconds) ** alpha if seconds > preferred else 1.0


def quantile(values: Iterable[float], share: float) -> float:
    """The value that this share of all lies below; infinite for a share of 1."""
    ordered = sorted(values)
    return math.inf if share >= 1 or not ordered else ordered[int(len(ordered) * share)]
