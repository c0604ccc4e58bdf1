"""Whose time a run goes by: the wall's, or that of a simulated fleet."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds, and how to let some pass."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def wait(self, until: float) -> None:
        """Return at this time, or earlier if something may have happened that is worth a look."""
        ...


class WallClock:
    """The time of this machine, looked at every `poll` seconds."""

    def __init__(self, *, poll: float = 3.0) -> None:
        self._poll = poll

    def now(self) -> float:
        return time.monotonic()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, min(self._poll, until - self.now())))
