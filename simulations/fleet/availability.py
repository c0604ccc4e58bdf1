"""When a device is plugged in, and when its owner leaves it alone: hours of the day, or recorded times."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from common.errors import AntherError
from common.seeding import derive_seed
from common.units import HOUR

DAY = 24.0 * HOUR
_NEAR = 4  # days that are looked at for one moment


class Availability(Protocol):
    """One device's habits; times are seconds of the fleet's clock."""

    def plugged(self, time: float) -> bool: ...

    def idle(self, time: float) -> bool:
        """Whether its owner doesn't use it."""
        ...

    def next_change(self, time: float) -> float:
        """A later time until which neither of the two changes."""
        ...


class DailySchedule:
    """The same hours every day, give or take.

    Args:
        plugged, idle: from when to when, hours of the owner's clock in pairs; what ends before it begins ends the day
            after.
        phase: seconds that the owner's clock is behind the fleet's.
        jitter: seconds that each beginning and end differs by at most, anew every day.
        seed: of what is drawn.
    """

    def __init__(
        self, plugged: Sequence[float], idle: Sequence[float], *, phase: float = 0.0, jitter: float = 0.0, seed: int = 0
    ) -> None:
        pairs = {"plugged": plugged, "idle": idle}
        self._pairs = {name: tuple(zip(hours[::2], hours[1::2], strict=True)) for name, hours in pairs.items()}
        self._phase, self._jitter, self._seed = phase, jitter, seed
        self._days: dict[int, dict[str, list[tuple[float, float]]]] = {}

    def plugged(self, time: float) -> bool:
        return self._within("plugged", time)

    def idle(self, time: float) -> bool:
        return self._within("idle", time)

    def next_change(self, time: float) -> float:
        edges = (edge for name in self._pairs for span in self._around(name, time) for edge in span)
        return min((edge for edge in edges if edge > time), default=math.inf)

    def _within(self, name: str, time: float) -> bool:
        return any(start <= time < end for start, end in self._around(name, time))

    def _around(self, name: str, time: float) -> list[tuple[float, float]]:
        """The spans of the days about this time."""
        if (0.0, 24.0) in self._pairs[name]:
            return [(-math.inf, math.inf)]
        today = math.floor((time - self._phase) / DAY)
        return [span for day in range(today - 1, today + 3) for span in self._day(day)[name]]

    def _day(self, day: int) -> dict[str, list[tuple[float, float]]]:
        if day not in self._days:
            self._days = {each: spans for each, spans in self._days.items() if abs(day - each) < _NEAR}
            self._days[day] = {
                name: [self._span(day, name, *pair) for pair in self._pairs[name]] for name in self._pairs
            }
        return self._days[day]

    def _span(self, day: int, name: str, start: float, end: float) -> tuple[float, float]:
        midnight = day * DAY + self._phase
        return (
            midnight + start * HOUR + self._drawn(day, name, start, "start"),
            midnight + end * HOUR + DAY * (end <= start) + self._drawn(day, name, start, "end"),
        )

    def _drawn(self, *key: object) -> float:
        return self._jitter * uniform(self._seed, *key, low=-1.0)


class RecordedSchedule:
    """Times at which a device was plugged in and idle, as somebody recorded them, over and over.

    Args:
        on: from when to when, seconds since a midnight, in order.
    """

    def __init__(self, on: Sequence[tuple[float, float]]) -> None:
        self._on = on

    def plugged(self, time: float) -> bool:
        return any(start <= time < end for start, end in self._around(time))

    def idle(self, time: float) -> bool:
        return self.plugged(time)

    def next_change(self, time: float) -> float:
        return min(edge for span in self._around(time) for edge in span if edge > time)

    def _around(self, time: float) -> list[tuple[float, float]]:
        """What was recorded, in this repetition and in those before and after it; each has whole days."""
        period = math.ceil(self._on[-1][1] / DAY) * DAY
        lap = math.floor(time / period)
        return [
            (begun + start, begun + end)
            for begun in (period * (lap - 1), period * lap, period * (lap + 1))
            for start, end in self._on
        ]


def uniform(*key: object, low: float = 0.0, high: float = 1.0) -> float:
    """A number of the interval that follows from the key alone."""
    return low + (high - low) * (derive_seed(*key) % 2**32) / 2**32


def load_traces(path: Path) -> dict[str, RecordedSchedule]:
    """Recorded times by device: CSV with the columns device, on and off, or JSON {device: [[on, off], …]}; in seconds.

    Raises AntherError, naming the file and the device, for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = _from_json(text) if path.suffix == ".json" else _from_csv(text)
    except (OSError, ValueError, TypeError, KeyError, csv.Error, RecursionError) as error:
        raise AntherError(
            f"fleet.trace={path}: can't be read as CSV with the columns device, on and off, or as JSON "
            f"{{device: [[on, off], …]}} ({' '.join(str(error).split())[:100]})"
        ) from error
    if not found:
        raise AntherError(f"fleet.trace={path}: names no device")
    for name, on in found.items():
        edges = [edge for span in on for edge in span]
        rising = all(before < after for before, after in pairwise(edges))
        if not (edges and rising and all(map(math.isfinite, edges)) and edges[0] >= 0):
            raise AntherError(f"fleet.trace={path}: times of {name[:50]!r} must rise from 0 on: on, off, on, off, …")
    return {name: RecordedSchedule(on) for name, on in found.items()}


def _from_csv(text: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        found.setdefault(row["device"], []).append((float(row["on"]), float(row["off"])))
    return found


def _from_json(text: str) -> dict[str, list[tuple[float, float]]]:
    found: Any = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return {str(name): [(float(on), float(off)) for on, off in spans] for name, spans in found.items()}
