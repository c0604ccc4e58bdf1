"""The device's current state, as far as its sensors measure it."""

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
    """One reading of all sensors; None: unknown. Every value except `watts` is either measured or unknown."""

    charging: bool | None = None
    """Connected to its charger, whether or not the battery is charging; None: no battery, or unknown."""
    battery: float | None = None
    """Charge of the battery, 0 to 1."""
    celsius: float | None = None
    """Temperature of the hottest sensor, batteries excluded, in °C."""
    battery_celsius: float | None = None
    """Temperature of the battery in °C; it ages at temperatures that do not harm a processor."""
    throttled: bool | None = None
    """The processor is slowed down, because of heat or a weak power supply."""
    free_mib: float = math.inf
    """MiB of memory that a process can still allocate without taking memory from others."""
    owner_active: bool | None = None
    metered: bool | None = None
    """The network is paid by volume."""
    watts: float | None = None
    """Power draw, if the same sensors report it; energy is measured by `client.power.meter`."""
    watts_quality: str = MEASURED


def combined(*parts: Conditions) -> Conditions:
    """Merge readings: highest temperature, least memory, throttled if any says so, else the first known value."""
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
    """Cache a reading for this many seconds: for values that change rarely and take a command to read.

    Args:
        read: takes a reading.
        seconds: lifetime of a reading.
        clock: returns seconds since any fixed time.
    """
    cached: list[tuple[float, Conditions]] = []

    def reading() -> Conditions:
        if not cached or clock() - cached[0][0] >= seconds:
            cached[:] = [(clock(), read())]
        return cached[0][1]

    return reading


def _hottest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _first(values: list[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)
