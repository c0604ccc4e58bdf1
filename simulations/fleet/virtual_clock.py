"""Virtual clock of a simulated fleet, which advances from event to event while the server waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

MAX_WAIT = 600.0
"""Maximum wait in simulated seconds. A waiting server then checks again, since a device may have been plugged in."""


class VirtualClock:
    """`strategies.clock.Clock` with an event queue; events of equal time run in the order in which they were added.

    Time is in seconds since the midnight at which the simulation started.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], bool]]] = []

    def now(self) -> float:
        return self._now

    def resume(self, time: float) -> None:
        """Continue at this time, with an empty event queue."""
        self._now, self._events = time, []

    def schedule(self, time: float, event: Callable[[], bool]) -> None:
        """Schedule an event, immediately if its time has passed; it returns whether it should end the current wait."""
        heapq.heappush(self._events, (max(time, self._now), next(self._order), event))

    def wait(self, until: float) -> None:
        """Advance to `until`, to the first event that ends the wait, or by `MAX_WAIT` seconds, whichever is first."""
        until = max(self._now, min(until, self._now + MAX_WAIT))
        while self._events and self._events[0][0] <= until:
            self._now, _, event = heapq.heappop(self._events)
            if event():
                return
        self._now = until
