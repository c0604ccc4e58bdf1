"""A battery: what is drawn comes out of it, what a charger gives beyond that goes into it."""

from __future__ import annotations

import math

from common.units import HOUR


def flow(drawn: float, *, plugged: bool, charger: float) -> float:
    """Watts into the battery; less than 0 while more is drawn than a charger gives."""
    return (charger if plugged else 0.0) - drawn


def charge_after(charge: float, watts: float, seconds: float, *, capacity: float) -> float:
    """Watt-hours in it: a full one takes no more, and a flat one gives none."""
    return min(max(charge + watts * seconds / HOUR, 0.0), capacity)


def seconds_until(level: float, charge: float, watts: float) -> float:
    """Until a charge has risen or fallen to this level; infinitely many if it moves away from it, or not at all."""
    if watts == 0.0 or (level - charge) / watts < 0.0:
        return math.inf
    return (level - charge) * HOUR / watts
