"""The time of a simulated fleet: it passes when somebody waits, from one event to the next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

MAX_WAIT = 600.0
"""Simulated seconds after which whoever waits may look again though nothing happened: a charger was plugged in, say."""


class VirtualClock:
    """A `strategies.clock.Clock` with a queue of events; two of one moment happen in the order that they were made in.

    It counts seconds since the midnight that the fleet's life began with.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], bool]]] = []

    def now(self) -> float:
        return self._now

    def resume(self, time: float) -> None:
        """Go on from here; nothing is to come yet of what was to happen."""
        self._now, self._events = time, []

    def at(self, time: float, event: Callable[[], bool]) -> None:
        """Have something happen then, or at once if that is over; it says whether it is worth a look."""
        heapq.heappush(self._events, (max(time, self._now), next(self._order), event))

    def wait(self, until: float) -> None:
        """Let time pass until then, until an event that is worth a look, or for `MAX_WAIT` seconds."""
        until = max(self._now, min(until, self._now + MAX_WAIT))
        while self._events and self._events[0][0] <= until:
            self._now, _, event = heapq.heappop(self._events)
            if event():
                return
        self._now = until
