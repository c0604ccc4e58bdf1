"""Utility of a device in Oort: the value of its loss, reduced by its training time (Lai et al., OSDI 2021, §4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from strategies.selection import DeviceCandidate


def statistical_utility(candidate: DeviceCandidate) -> float | None:
    """Compute U = |B| √(Σ loss² / |B|) (eq. 1); None without a reported loss.

    B are the examples that the device would train on. The mean of their losses replaces the root of their mean square,
    since devices report nothing else; it is never larger.
    """
    return None if candidate.loss is None else candidate.plan.steps * candidate.plan.batch_size * candidate.loss


def unit_range(values: Sequence[float], clip: float) -> list[float]:
    """Clip values at their quantile `clip`, and scale them to the range 0 to 1; equal values give 0."""
    if not values:
        return []
    ordered = sorted(values)
    high = ordered[min(int(len(ordered) * clip), len(ordered) - 1)]
    low = ordered[0]
    return [(min(value, high) - low) / (high - low) if high > low else 0.0 for value in values]


def staleness_bonus(round: int, last: int) -> float:
    """Compute √(0.1 ln R / L) for a device that was last asked in round L (algorithm 1); it grows with the round R."""
    return math.sqrt(0.1 * math.log(round) / last)


def system_utility(seconds: float, preferred: float, alpha: float) -> float:
    """Compute (T / t)^α for a time t longer than the preferred T, and 1 otherwise (eq. 1).

    Args:
        seconds: t.
        preferred: T.
        alpha: α.
    """
    return (preferred / seconds) ** alpha if seconds > preferred else 1.0


def quantile(values: Iterable[float], fraction: float) -> float:
    """Return the value that this fraction of all values lies below; infinite for a fraction of 1."""
    ordered = sorted(values)
    return math.inf if fraction >= 1 or not ordered else ordered[int(len(ordered) * fraction)]
