"""Heat: a device at work warms up until it is hot, and works slower from then until it has rested and is cool."""

from __future__ import annotations

import math
from typing import NamedTuple


class Heat(NamedTuple):
    """How warm a device is."""

    level: float = 0.0
    """0: cool; 1: as hot as it gets."""
    hot: bool = False
    """It works slower: since its level was 1, until it is 0."""


def heat_after(heat: Heat, seconds: float, *, working: bool, hot_after: float | None, cool_after: float) -> Heat:
    """After so long at work or at rest: from cool to hot in `hot_after` seconds (None: never), back in `cool_after`."""
    change = -seconds / cool_after if not working else seconds / hot_after if hot_after else 0.0
    level = min(max(heat.level + change, 0.0), 1.0)
    return Heat(level, level >= 1.0 or (heat.hot and level > 0.0))


def seconds_until_change(heat: Heat, *, working: bool, hot_after: float | None, cool_after: float) -> float:
    """Until it becomes hot, or is no longer; infinitely many if it goes on as it is."""
    if working:
        return math.inf if heat.hot or not hot_after else (1.0 - heat.level) * hot_after
    return heat.level * cool_after if heat.hot else math.inf
