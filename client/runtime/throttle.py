"""Training yields to the owner: it waits, with what it has, while a device should not train, and lets go if it must.

A guard is asked before a base is loaded and before every job, by `training.jobs.Train.cancelled` after every pass and
before every step of an empty batch, and by all other jobs before every pass. So a charger that is pulled, heat, or an
owner who sits down stops training before its next step is taken. Where steps are faster than sensors are read
(`interval`), that is within 2 s instead.
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
"""Share of a full one by which a battery must be over its limit before training goes on: else it would flap."""
COOLER = 5.0
"""Degrees by which a device must be under its limit before training goes on."""
SHARE, OLDEST, SLOW_SHARE = 1 / 50, 2.0, 1 / 10
"""Reading sensors may take a fiftieth of the time; but no reading is older than 2 s, unless it takes over 0.2 s."""

log = logging.getLogger(__name__)


def reason(now: Conditions, settings: node.ThrottleConfig, *, waiting: bool = False) -> str | None:
    """Why training should wait, for the owner's log; None: it need not. What isn't known is no reason.

    Args:
        waiting: training waits already, and goes on only once battery and heat are well within their limits.
    """
    least = min(1.0, settings.min_battery + BATTERY_MARGIN * waiting)
    if settings.require_charging and now.charging is False:
        return "not on its charger"
    if settings.min_battery and now.battery is not None and now.battery < least:
        return f"the battery is at {now.battery:.0%}, and should be at {least:.0%}"
    if wrong := _hot(now.celsius, settings.max_celsius, waiting=waiting):
        return wrong
    if wrong := _hot(now.battery_celsius, settings.max_battery_celsius, waiting=waiting):
        return f"the battery: {wrong}"
    if settings.max_celsius is not None and now.throttled:
        return "it is throttled"
    if settings.require_idle and now.owner_active:
        return "its owner uses it"
    if settings.require_unmetered and now.metered:
        return "its network is metered"
    return None


def _hot(celsius: float | None, most: float | None, *, waiting: bool) -> str | None:
    if celsius is None or most is None or celsius <= (most := most - COOLER * waiting):
        return None
    return f"{celsius:.0f} °C, and should be {most:.0f} °C"


def shortage(now: Conditions, settings: node.ThrottleConfig) -> str | None:
    """Why training should give its memory back; None: it need not."""
    if now.free_mib >= settings.min_free_mib:
        return None
    return f"{now.free_mib:.0f} MiB of memory are free, and {settings.min_free_mib:.0f} should be"


def interval(cost: float) -> float:
    """Seconds between two readings of which each takes `cost` seconds."""
    return min(cost / SHARE, max(OLDEST, cost / SLOW_SHARE))


class _Look(NamedTuple):
    """What a reading leads to."""

    stop: str | None = None
    wait: str | None = None
    out_of_memory: bool = False

    @property
    def why(self) -> str | None:
        return self.stop or self.wait


class Guard:
    """Asked between passes whether to stop: False at once when all is well, True to stop and give memory back.

    In between it blocks: while there is a `reason`, for no longer than `settings.patience`. It stops at once when
    memory is short, and when `stop` is set. Sensors that can't be read are a reason like any other.

    Args:
        read: what holds now.
        stop: set when whoever trains is to end; wakes a guard that waits.
        pausing: entered for as long as it waits (`client.power.meter.Meter.paused`).
        clock: seconds, of any origin.
        sleep: waits for so many seconds; None: on `stop`.

    Attributes:
        pauses, paused_seconds, stops: how often and how long it has waited, and how often it said to stop.
        last_reason: why it waited or stopped last.
        out_of_memory: whether it stopped last for want of memory.
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
        self._asking = threading.Lock()  # passes run in several threads, and all of them wait while one does

    def must_wait(self) -> str | None:
        """Why it should not train now; None: it may."""
        return self._look(waiting=False).why

    def __call__(self) -> bool:
        with self._asking:
            return self._must_stop()

    def _must_stop(self) -> bool:
        if not self.stop.is_set() and self._clock() < self._fresh_until:
            return False
        look = self._look(waiting=False)
        if look.stop is None and look.wait is not None:
            look = self._outlasted(look.wait)
        if look.stop is None:
            return False
        self.stops += 1
        self.last_reason, self.out_of_memory = look.stop, look.out_of_memory
        self._fresh_until = self._clock()  # whoever asks next is to look again
        log.info("training stops: %s", look.stop)
        return True

    def _outlasted(self, why: str) -> _Look:
        """Wait, and what there is to see when it ends."""
        self.pauses += 1
        self.last_reason = why
        log.info("training pauses: %s", why)
        began = self._clock()
        with self._pausing():
            look = self._wait(why, began)
        waited = self._clock() - began
        self.paused_seconds += waited
        if look.stop is None:
            log.info("training goes on after %.0f s", waited)
        return look

    def _wait(self, why: str, began: float) -> _Look:
        """Look again and again, until there is no reason to wait, one to stop, or no patience."""
        look = _Look(wait=why)
        while look.stop is None and look.wait is not None:
            left = self.settings.max_wait_seconds - (self._clock() - began)
            if left <= 0:
                return _Look(stop=f"{look.wait}, for {self.settings.max_wait_seconds:.0f} s now")
            self._sleep(min(left, self.settings.poll_seconds))
            look = self._look(waiting=True)
        return look

    def _look(self, *, waiting: bool) -> _Look:
        """Read anew."""
        if self.stop.is_set():
            return _Look(stop="it is to end")
        began = self._clock()
        try:
            now = self._read()
        except Exception as error:
            return _Look(wait=f"sensors can't be read ({error})")
        finally:
            ended = self._clock()
            self._fresh_until = ended + interval(ended - began)
        short = shortage(now, self.settings)
        return _Look(stop=short, wait=reason(now, self.settings, waiting=waiting), out_of_memory=short is not None)
