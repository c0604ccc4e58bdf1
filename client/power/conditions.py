"""What holds on a device now, as far as its sensors say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

MEASURED, ESTIMATE = "measured", "estimate"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """One reading of everything; None: nobody knows. All but `watts` is measured, or it isn't there."""

    charging: bool | None = None
    """On its charger, whether or not the battery takes anything; None: it has no battery, or doesn't tell."""
    battery: float | None = None
    """Share of a full one that is left, 0 to 1."""
    celsius: float | None = None
    """Of its hottest sensor, but the battery's."""
    battery_celsius: float | None = None
    """Of its battery, which ages at a heat that a processor doesn't feel."""
    throttled: bool | None = None
    """It runs slower than it could, for heat or for want of current."""
    free_mib: float = math.inf
    """Memory that a process could still take without any other losing its own."""
    owner_active: bool | None = None
    metered: bool | None = None
    """Its network is paid by volume."""
    watts: float | None = None
    """What it draws, where that comes with the rest; energy is the meter's affair (`client.power.meter`)."""
    watts_quality: str = MEASURED


def combined(*parts: Conditions) -> Conditions:
    """One of all parts: the hottest sensor, the least memory, throttled if any says so, else who tells first."""
    watts = next((part for part in parts if part.watts is not None), Conditions())
    return Conditions(
        charging=_first([part.charging for part in parts]),
        battery=_first([part.battery for part in parts]),
        celsius=_hottest([part.celsius for part in parts]),
        battery_celsius=_hottest([part.battery_celsius for part in parts]),
        throttled=max((part.throttled for part in parts if part.throttled is not None), default=None),
        free_mib=min((part.free_mib for part in parts), default=math.inf),
        owner_active=_first([part.owner_active for part in parts]),
        metered=_first([part.metered for part in parts]),
        watts=watts.watts,
        watts_quality=watts.watts_quality,
    )


def cached_for(
    read: Callable[[], Conditions], seconds: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[], Conditions]:
    """The same reading for so many seconds: of what changes seldom, and takes a command to read."""
    kept: list[tuple[float, Conditions]] = []

    def reading() -> Conditions:
        if not kept or clock() - kept[0][0] >= seconds:
            kept[:] = [(clock(), read())]
        return kept[0][1]

    return reading


def _hottest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _first(values: list[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)
