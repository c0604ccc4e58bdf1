"""Clock of a run: wall time, or the virtual time of a simulated fleet."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Clock in seconds, which can also wait until a time."""

    def now(self) -> float:
        """Return seconds since a fixed point in time."""
        ...

    def wait(self, until: float) -> None:
        """Wait until the given time; may return earlier if an event may have happened."""
        ...


class WallClock:
    """Monotonic time of this machine; waits return every `poll` seconds."""

    def __init__(self, *, poll: float = 3.0) -> None:
        self._poll = poll

    def now(self) -> float:
        return time.monotonic()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, min(self._poll, until - self.now())))
