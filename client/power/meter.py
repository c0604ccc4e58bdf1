"""What training took, in seconds and joules: measured where something measures, estimated where nothing does.

The number is of everything that its source covers while training runs, idle power included: nothing is subtracted.
Pauses count neither as time nor as energy. No sensor fails a round: what can't be read is left out, and what is left
out too long makes an estimate of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from client.power.conditions import ESTIMATE, MEASURED

LONGEST = 30.0
"""Seconds between two readings of watts over which the energy is still taken for known."""
ENOUGH = 0.5
"""Share of the time that must be covered; the rest is taken for alike. With less it is an estimate."""

log = logging.getLogger(__name__)


class TrainingCost(NamedTuple):
    """What training took."""

    seconds: float
    joules: float
    quality: str  # `measured`, or `estimate` if either is one


@dataclass(frozen=True, kw_only=True)
class EnergySource:
    """Something that measures."""

    name: str
    covers: str
    """What its number is of, for people."""
    read: Callable[[], float | None]
    """Watts now, or joules so far; None: nothing to be had now."""
    counts: bool = False
    """Whether they are joules so far."""
    quality: str = MEASURED


@dataclass
class EnergyIntegral:
    """Energy from readings at points in time: trapezoids under watts, differences of joules."""

    counts: bool
    seconds: float = 0.0
    """Covered by readings."""
    joules: float = 0.0
    _last: tuple[float, float] | None = field(default=None, repr=False)

    def add(self, at: float, value: float | None) -> None:
        """A reading; a missing one changes nothing, until the gap is too long for watts."""
        if value is None:
            return
        if self._last is not None:
            before, was = self._last
            joules = value - was if self.counts else (at - before) * (value + was) / 2
            if joules >= 0 and (self.counts or at - before <= LONGEST):
                self.seconds += at - before
                self.joules += joules
        self._last = (at, value)

    def cut(self) -> None:
        """What comes next doesn't follow what came last: there was a pause."""
        self._last = None


def total(found: EnergyIntegral | None, *, seconds: float, watts: float, quality: str = MEASURED) -> TrainingCost:
    """What so many seconds took: as integrated, stretched over what wasn't covered, or else at so many watts."""
    if found is None or not found.seconds or found.seconds < ENOUGH * seconds:
        return TrainingCost(seconds, seconds * watts, ESTIMATE)
    return TrainingCost(seconds, found.joules * max(1.0, seconds / found.seconds), quality)


class Meter:
    """`with meter: …` measures what is done within; `last` is what that took.

    Readings are taken when it starts, pauses, resumes and ends, and in between by a thread, which a sensor that is slow
    to read keeps busy for a twentieth of the time at most.

    Args:
        source: None: nothing measures energy, and only seconds are real.
        watts: what the device is taken to draw where nothing measured it.
        every: seconds between readings, at least.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        source: EnergySource | None,
        *,
        watts: float,
        every: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source, self.watts = source, watts
        self.last: TrainingCost | None = None
        self._every, self._clock = every, clock
        self._lock = threading.Lock()
        self._running: float | None = None  # since when; None: it is paused, or off
        self._on, self._failed = False, False
        self._seconds = 0.0
        self._integral: EnergyIntegral | None = None
        self._end = threading.Event()

    def __enter__(self) -> Meter:
        self._seconds, self._on, self._end = 0.0, True, threading.Event()
        self._integral = EnergyIntegral(self.source.counts) if self.source else None
        self._go()
        if self.source:
            threading.Thread(target=self._look, args=(self._end,), name="meter", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._halt()
        self._end.set()
        self._on = False
        quality = self.source.quality if self.source else ESTIMATE
        self.last = total(self._integral, seconds=self._seconds, watts=self.watts, quality=quality)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context nothing counts; harmless where nothing is being measured."""
        if not self._on:
            yield
            return
        self._halt()
        try:
            yield
        finally:
            self._go()

    def _go(self) -> None:
        with self._lock:
            if self._integral:
                self._integral.cut()
            self._running = self._clock()
            self._sample()

    def _halt(self) -> None:
        with self._lock:
            self._sample()
            if self._running is not None:
                self._seconds += self._clock() - self._running
            self._running = None

    def _look(self, end: threading.Event) -> None:
        pause = self._every
        while not end.wait(pause):
            with self._lock:
                began = self._clock()
                if self._running is not None and not end.is_set():
                    self._sample()
                pause = max(self._every, min(LONGEST / 2, 20 * (self._clock() - began)))

    def _sample(self) -> None:
        """A reading at its own time; whatever goes wrong with it, training goes on."""
        if self.source is None or self._integral is None:
            return
        try:
            self._integral.add(self._clock(), self.source.read())
        except Exception as error:
            if not self._failed:  # once: it may go on like that for hours
                log.warning("%s can't be read: %s", self.source.name, error)
            self._failed = True
