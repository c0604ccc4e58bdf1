"""Times at which a device is plugged in and unused by its owner: daily hours or recorded times."""

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
_CACHED_DAYS = 4  # days around the current time whose spans are kept


class Availability(Protocol):
    """Charging and usage habits of one device; times are seconds on the fleet's clock."""

    def plugged(self, time: float) -> bool: ...

    def idle(self, time: float) -> bool:
        """Return whether the owner doesn't use the device."""
        ...

    def next_change(self, time: float) -> float:
        """Return a later time until which neither `plugged` nor `idle` changes."""
        ...


class DailySchedule:
    """The same hours every day, with jitter.

    Args:
        plugged: start and end hours on the owner's clock, in pairs; a span whose end is not after its start ends on the
            next day.
        idle: hours in which the owner doesn't use the device, in the same form.
        phase: seconds by which the owner's clock is behind the fleet's.
        jitter: maximum deviation of each start and end in seconds, drawn again every day.
        seed: seed of the jitter.
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
        """Return the spans (start, end) of the days around this time."""
        if (0.0, 24.0) in self._pairs[name]:
            return [(-math.inf, math.inf)]
        today = math.floor((time - self._phase) / DAY)
        return [span for day in range(today - 1, today + 3) for span in self._day(day)[name]]

    def _day(self, day: int) -> dict[str, list[tuple[float, float]]]:
        if day not in self._days:
            self._days = {cached: spans for cached, spans in self._days.items() if abs(day - cached) < _CACHED_DAYS}
            self._days[day] = {
                name: [self._span(day, name, *pair) for pair in self._pairs[name]] for name in self._pairs
            }
        return self._days[day]

    def _span(self, day: int, name: str, start: float, end: float) -> tuple[float, float]:
        midnight = day * DAY + self._phase
        return (
            midnight + start * HOUR + self._deviation(day, name, start, "start"),
            midnight + end * HOUR + DAY * (end <= start) + self._deviation(day, name, start, "end"),
        )

    def _deviation(self, *key: object) -> float:
        return self._jitter * uniform(self._seed, *key, low=-1.0)


class RecordedSchedule:
    """Recorded times at which a device was plugged in and idle, repeated cyclically.

    Args:
        spans: (start, end) in order, in seconds since a midnight.
    """

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self._spans = spans

    def plugged(self, time: float) -> bool:
        return any(start <= time < end for start, end in self._around(time))

    def idle(self, time: float) -> bool:
        return self.plugged(time)

    def next_change(self, time: float) -> float:
        return min(edge for span in self._around(time) for edge in span if edge > time)

    def _around(self, time: float) -> list[tuple[float, float]]:
        """Return the recorded spans of this repetition and the two next to it; a repetition takes whole days."""
        period = math.ceil(self._spans[-1][1] / DAY) * DAY
        repetition = math.floor(time / period)
        return [
            (offset + start, offset + end)
            for offset in (period * (repetition - 1), period * repetition, period * (repetition + 1))
            for start, end in self._spans
        ]


def uniform(*key: object, low: float = 0.0, high: float = 1.0) -> float:
    """Return a pseudorandom number in the interval, determined by the key."""
    return low + (high - low) * (derive_seed(*key) % 2**32) / 2**32


def load_traces(path: Path) -> dict[str, RecordedSchedule]:
    """Load recorded times by device, in seconds.

    The file is CSV with the columns device, on and off, or JSON {device: [[on, off], …]}.

    Raises:
        AntherError: the file has another format; the message names the file and the device.
    """
    try:
        text = path.read_text(encoding="utf-8")
        traces = _from_json(text) if path.suffix == ".json" else _from_csv(text)
    except (OSError, ValueError, TypeError, KeyError, csv.Error, RecursionError) as error:
        raise AntherError(
            f"fleet.trace={path}: can't be read as CSV with the columns device, on and off, or as JSON "
            f"{{device: [[on, off], …]}} ({' '.join(str(error).split())[:100]})"
        ) from error
    if not traces:
        raise AntherError(f"fleet.trace={path}: contains no device")
    for name, spans in traces.items():
        edges = [edge for span in spans for edge in span]
        rising = all(before < after for before, after in pairwise(edges))
        if not (edges and rising and all(map(math.isfinite, edges)) and edges[0] >= 0):
            raise AntherError(f"fleet.trace={path}: times of {name[:50]!r} must increase from 0: on, off, on, off, …")
    return {name: RecordedSchedule(spans) for name, spans in traces.items()}


def _from_csv(text: str) -> dict[str, list[tuple[float, float]]]:
    traces: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        traces.setdefault(row["device"], []).append((float(row["on"]), float(row["off"])))
    return traces


def _from_json(text: str) -> dict[str, list[tuple[float, float]]]:
    traces: Any = json.loads(text)
    if not isinstance(traces, dict):
        raise ValueError("not a JSON object")
    return {str(name): [(float(on), float(off)) for on, off in spans] for name, spans in traces.items()}
