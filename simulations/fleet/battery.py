"""Battery charge under constant power."""

from __future__ import annotations

import math

from common.units import HOUR


def flow(drawn: float, *, plugged: bool, charger: float) -> float:
    """Return the power into the battery in watts, negative while the device draws more than the charger delivers.

    Args:
        drawn: power that the device draws, in watts.
        plugged: whether the device is plugged in.
        charger: power of its charger, in watts.
    """
    return (charger if plugged else 0.0) - drawn


def charge_after(charge: float, watts: float, seconds: float, *, capacity: float) -> float:
    """Return the charge in watt-hours after `seconds` at constant power, limited to 0 and `capacity`.

    Args:
        charge: charge at the start, in watt-hours.
        watts: power into the battery (`flow`).
        seconds: duration.
        capacity: charge of a full battery, in watt-hours.
    """
    return min(max(charge + watts * seconds / HOUR, 0.0), capacity)


def seconds_until(level: float, charge: float, watts: float) -> float:
    """Return the seconds until the charge reaches a level; infinity if it is constant or moves away from the level.

    Args:
        level: charge to reach, in watt-hours.
        charge: charge now, in watt-hours.
        watts: power into the battery (`flow`).
    """
    if watts == 0.0 or (level - charge) / watts < 0.0:
        return math.inf
    return (level - charge) * HOUR / watts
