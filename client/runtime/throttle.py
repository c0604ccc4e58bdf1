"""Pause training while the device should not train, and stop it if it must.

The throttle is checked before a base is loaded, before every job, and between passes: by
`training.jobs.TrainJob.cancelled` after every pass and before every step with an empty batch, and by all other jobs
before every pass. So training stops before its next step if the charger is disconnected, the device gets hot, or the
owner starts to use it. If steps are faster than sensors are read (`interval`), it stops within 2 s instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from client.power.conditions import Conditions
from conf.schemas import node

BATTERY_MARGIN = 0.05
"""Charge, as a fraction, by which a battery must exceed its limit before training resumes (hysteresis)."""
CELSIUS_MARGIN = 5.0
"""Degrees by which the device must be below its limit before training resumes."""
READ_SHARE, MAX_AGE, SLOW_READ_SHARE = 1 / 50, 2.0, 1 / 10
"""Reading sensors may take a fiftieth of the time; but no reading is older than 2 s, unless it takes over 0.2 s."""

log = logging.getLogger(__name__)


def pause_reason(now: Conditions, settings: node.ThrottleConfig, *, waiting: bool = False) -> str | None:
    """Return the reason to pause training, for the owner's log, or None. An unknown value is never a reason.

    Args:
        now: current sensor readings.
        settings: the owner's limits.
        waiting: training is paused already, and resumes only once battery and temperature are well within their limits.
    """
    min_battery = min(1.0, settings.min_battery + BATTERY_MARGIN * waiting)
    if settings.require_charging and now.charging is False:
        return "the device is not charging"
    if settings.min_battery and now.battery is not None and now.battery < min_battery:
        return f"the battery is at {now.battery:.0%}; training needs {min_battery:.0%}"
    if problem := _too_hot(now.celsius, settings.max_celsius, waiting=waiting):
        return problem
    if problem := _too_hot(now.battery_celsius, settings.max_battery_celsius, waiting=waiting):
        return f"the battery: {problem}"
    if settings.max_celsius is not None and now.throttled:
        return "the processor is slowed down by heat or a weak power supply"
    if settings.require_idle and now.owner_active:
        return "the device is in use"
    if settings.require_unmetered and now.metered:
        return "the network is metered"
    return None


def _too_hot(celsius: float | None, limit: float | None, *, waiting: bool) -> str | None:
    """Return the message for a temperature above its limit; None: it is below, or unknown."""
    if celsius is None or limit is None or celsius <= (limit := limit - CELSIUS_MARGIN * waiting):
        return None
    return f"temperature {celsius:.0f} °C; training needs {limit:.0f} °C or less"


def shortage(now: Conditions, settings: node.ThrottleConfig) -> str | None:
    """Return the reason to stop training and release its memory, or None."""
    if now.free_mib >= settings.min_free_mib:
        return None
    return f"only {now.free_mib:.0f} MiB of memory are free; training needs {settings.min_free_mib:.0f} MiB"


def interval(cost: float) -> float:
    """Return the seconds between two sensor readings that take `cost` seconds each."""
    return min(cost / READ_SHARE, max(MAX_AGE, cost / SLOW_READ_SHARE))


class _Reading(NamedTuple):
    """Conclusion from one sensor reading."""

    stop: str | None = None
    wait: str | None = None
    out_of_memory: bool = False

    @property
    def cause(self) -> str | None:
        return self.stop or self.wait


class Throttle:
    """Callable that is checked between passes. It returns False to continue, True to stop and release memory.

    While `pause_reason` returns a reason, the call blocks, for at most `settings.max_wait_seconds`. It returns True
    immediately if memory is short or `stop` is set. Unreadable sensors are a reason to pause.

    Args:
        settings: the owner's limits.
        read: reads the sensors.
        stop: set to end training; wakes a paused throttle.
        pausing: context entered during a pause (`client.power.meter.Meter.paused`).
        clock: returns seconds since any fixed time.
        sleep: waits for this many seconds; None: waits on `stop`.

    Attributes:
        pauses: number of pauses.
        paused_seconds: total duration of pauses.
        stops: number of times that it returned True.
        last_reason: reason of the last pause or stop.
        out_of_memory: whether the last stop was for lack of memory.
    """

    def __init__(
        self,
        settings: node.ThrottleConfig,
        read: Callable[[], Conditions],
        *,
        stop: threading.Event | None = None,
        pausing: Callable[[], AbstractContextManager[object]] = nullcontext,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.settings, self.stop = settings, stop or threading.Event()
        self.pauses, self.stops, self.paused_seconds = 0, 0, 0.0
        self.last_reason: str | None = None
        self.out_of_memory = False
        self._read, self._pausing, self._clock = read, pausing, clock
        self._sleep = sleep or self.stop.wait
        self._fresh_until = clock()
        self._lock = threading.Lock()  # passes run in several threads; all of them pause together

    def must_wait(self) -> str | None:
        """Return the reason why training should not start now, or None."""
        return self._check(waiting=False).cause

    def __call__(self) -> bool:
        with self._lock:
            return self._must_stop()

    def _must_stop(self) -> bool:
        if not self.stop.is_set() and self._clock() < self._fresh_until:
            return False
        reading = self._check(waiting=False)
        if reading.stop is None and reading.wait is not None:
            reading = self._pause(reading.wait)
        if reading.stop is None:
            return False
        self.stops += 1
        self.last_reason, self.out_of_memory = reading.stop, reading.out_of_memory
        self._fresh_until = self._clock()  # the next call reads the sensors again
        log.info("training stops: %s", reading.stop)
        return True

    def _pause(self, cause: str) -> _Reading:
        """Block while there is a reason to pause; return the reading that ended the pause."""
        self.pauses += 1
        self.last_reason = cause
        log.info("training pauses: %s", cause)
        started = self._clock()
        with self._pausing():
            reading = self._wait(cause, started)
        waited = self._clock() - started
        self.paused_seconds += waited
        if reading.stop is None:
            log.info("training resumes after %.0f s", waited)
        return reading

    def _wait(self, cause: str, started: float) -> _Reading:
        """Read sensors repeatedly until there is no reason to pause, a reason to stop, or the maximum wait is over."""
        reading = _Reading(wait=cause)
        while reading.stop is None and reading.wait is not None:
            remaining = self.settings.max_wait_seconds - (self._clock() - started)
            if remaining <= 0:
                return _Reading(stop=f"{reading.wait}; waited for {self.settings.max_wait_seconds:.0f} s")
            self._sleep(min(remaining, self.settings.poll_seconds))
            reading = self._check(waiting=True)
        return reading

    def _check(self, *, waiting: bool) -> _Reading:
        """Take a new sensor reading."""
        if self.stop.is_set():
            return _Reading(stop="the worker is shutting down")
        started = self._clock()
        try:
            now = self._read()
        except Exception as error:
            return _Reading(wait=f"sensors can't be read ({error})")
        finally:
            ended = self._clock()
            self._fresh_until = ended + interval(ended - started)
        short = shortage(now, self.settings)
        return _Reading(
            stop=short, wait=pause_reason(now, self.settings, waiting=waiting), out_of_memory=short is not None
        )
