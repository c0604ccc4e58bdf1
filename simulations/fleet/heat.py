"""Thermal throttling: a working device warms up, and once hot it works slower until it has cooled down completely."""

from __future__ import annotations

import math
from typing import NamedTuple


class Heat(NamedTuple):
    """Thermal state of a device."""

    level: float = 0.0
    """0: cool; 1: hottest."""
    hot: bool = False
    """Whether the device is throttled: from the time at which its level reaches 1 until the level is 0 again."""


def heat_after(heat: Heat, seconds: float, *, working: bool, throttle_after: float | None, cooldown: float) -> Heat:
    """Return the thermal state after `seconds` of constant activity.

    Args:
        heat: state at the start.
        seconds: duration.
        working: whether the device computes.
        throttle_after: seconds of work from cool to hot; None: the device never gets hot.
        cooldown: seconds of rest from hot to cool.
    """
    change = -seconds / cooldown if not working else seconds / throttle_after if throttle_after else 0.0
    level = min(max(heat.level + change, 0.0), 1.0)
    return Heat(level, level >= 1.0 or (heat.hot and level > 0.0))


def seconds_until_change(heat: Heat, *, working: bool, throttle_after: float | None, cooldown: float) -> float:
    """Return the seconds until throttling starts or ends; infinity if the activity never changes it.

    Args: as for `heat_after`.
    """
    if working:
        return math.inf if heat.hot or not throttle_after else (1.0 - heat.level) * throttle_after
    return heat.level * cooldown if heat.hot else math.inf
