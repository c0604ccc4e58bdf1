"""Duration and energy of training: measured if the device has a meter, estimated otherwise.

The energy is everything that the source covers while training runs, including idle power: nothing is subtracted. Pauses
count neither as time nor as energy. A failing sensor never fails a round: missing readings are skipped, and with too
few readings the result is an estimate.
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
from client.power.system import System
from common.plugins import Registry

MAX_GAP = 30.0
"""Maximum seconds between two readings of watts; the energy of a longer gap is unknown."""
MIN_COVERAGE = 0.5
"""Fraction of the time that readings must cover; the remainder is extrapolated. Below it the result is an estimate."""

log = logging.getLogger(__name__)


class TrainingCost(NamedTuple):
    """Duration and energy of one training."""

    seconds: float
    joules: float
    quality: str  # `measured`, or `estimate` if seconds or joules are estimated


@dataclass(frozen=True, kw_only=True)
class EnergySource:
    """A sensor of power or energy."""

    name: str
    covers: str
    """Parts of the device that it measures, as text for the owner."""
    read: Callable[[], float | None]
    """Return watts now, or joules so far; None: no reading now."""
    counts: bool = False
    """Whether `read` returns joules so far instead of watts."""
    quality: str = MEASURED


@dataclass(frozen=True, kw_only=True)
class PowerMeter:
    """A kind of meter, that a device may have."""

    make: Callable[[System], EnergySource]
    order: int
    """Position among the meters that `power.meter=auto` tries: those that cover most of the device come first."""
    cuda: bool
    """Whether it counts only if training uses the GPU."""
    works: Callable[[System], bool] | None
    """Whether a device has it; None: whether it gives a reading now."""
    hint: str
    """How to enable it."""

    def source(self, system: System) -> EnergySource | None:
        """Return the meter of a device, None if it doesn't have it."""
        source = self.make(system)
        works = source.read() is not None if self.works is None else self.works(system)
        return source if works else None


METERS: Registry[PowerMeter] = Registry("power_meter", key="power.meter", modules="client.power", on_device=True)


def power_meter(
    name: str, *, order: int = 100, cuda: bool = False, works: Callable[[System], bool] | None = None, hint: str = ""
) -> Callable[[Callable[[System], EnergySource]], PowerMeter]:
    """Return a decorator that registers a function as a meter.

    Args:
        name: value of `power.meter`.
        order: see `PowerMeter`.
        cuda: see `PowerMeter`.
        works: see `PowerMeter`.
        hint: see `PowerMeter`.
    """

    def decorate(make: Callable[[System], EnergySource]) -> PowerMeter:
        meter = PowerMeter(make=make, order=order, cuda=cuda, works=works, hint=hint)
        return METERS.register(name)(meter)

    return decorate


@dataclass
class EnergyIntegral:
    """Energy from timed readings: trapezoidal rule for watts, differences for joules."""

    counts: bool
    seconds: float = 0.0
    """Time covered by readings."""
    joules: float = 0.0
    _last: tuple[float, float] | None = field(default=None, repr=False)

    def add(self, at: float, value: float | None) -> None:
        """Add a reading; a missing one changes nothing, until the gap is too long for watts."""
        if value is None:
            return
        if self._last is not None:
            last_at, last_value = self._last
            joules = value - last_value if self.counts else (at - last_at) * (value + last_value) / 2
            if joules >= 0 and (self.counts or at - last_at <= MAX_GAP):
                self.seconds += at - last_at
                self.joules += joules
        self._last = (at, value)

    def cut(self) -> None:
        """Start a new interval after a pause."""
        self._last = None


def total_cost(
    integral: EnergyIntegral | None, *, seconds: float, watts: float, quality: str = MEASURED
) -> TrainingCost:
    """Return the cost of training: the integral, extrapolated to uncovered time, or else the assumed watts.

    Args:
        integral: the integrated readings; None: no meter.
        seconds: duration of training, pauses excluded.
        watts: assumed power if readings cover too little.
        quality: quality of the readings, `measured` or `estimate`.
    """
    if integral is None or not integral.seconds or integral.seconds < MIN_COVERAGE * seconds:
        return TrainingCost(seconds, seconds * watts, ESTIMATE)
    return TrainingCost(seconds, integral.joules * max(1.0, seconds / integral.seconds), quality)


class Meter:
    """Measure the cost of the work within `with meter:`; `last` is the result.

    Readings are taken at start, pause, resume and end, and in between by a thread, which spends at most a twentieth of
    its time on a slow sensor.

    Args:
        source: the energy source; None: only time is measured.
        watts: assumed power if energy isn't measured.
        every: minimum seconds between readings.
        clock: returns seconds since any fixed time.
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
        self._running: float | None = None  # start of the running interval; None: paused or off
        self._on, self._failed = False, False
        self._seconds = 0.0
        self._integral: EnergyIntegral | None = None
        self._end = threading.Event()

    def __enter__(self) -> Meter:
        self._seconds, self._on, self._end = 0.0, True, threading.Event()
        self._integral = EnergyIntegral(self.source.counts) if self.source else None
        self._resume()
        if self.source:
            threading.Thread(target=self._sample_loop, args=(self._end,), name="meter", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._suspend()
        self._end.set()
        self._on = False
        quality = self.source.quality if self.source else ESTIMATE
        self.last = total_cost(self._integral, seconds=self._seconds, watts=self.watts, quality=quality)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop counting within this context; no effect if nothing is being measured."""
        if not self._on:
            yield
            return
        self._suspend()
        try:
            yield
        finally:
            self._resume()

    def _resume(self) -> None:
        with self._lock:
            if self._integral:
                self._integral.cut()
            self._running = self._clock()
            self._sample()

    def _suspend(self) -> None:
        with self._lock:
            self._sample()
            if self._running is not None:
                self._seconds += self._clock() - self._running
            self._running = None

    def _sample_loop(self, end: threading.Event) -> None:
        pause = self._every
        while not end.wait(pause):
            with self._lock:
                began = self._clock()
                if self._running is not None and not end.is_set():
                    self._sample()
                pause = max(self._every, min(MAX_GAP / 2, 20 * (self._clock() - began)))

    def _sample(self) -> None:
        """Take a reading with its own timestamp; an error never stops training."""
        if self.source is None or self._integral is None:
            return
        try:
            self._integral.add(self._clock(), self.source.read())
        except Exception as error:
            if not self._failed:  # once: this may recur for hours
                log.warning("%s can't be read: %s", self.source.name, error)
            self._failed = True
