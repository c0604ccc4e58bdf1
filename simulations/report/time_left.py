"""Time left of a run, from the work of its rounds and after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class RunWork(NamedTuple):
    """Work of a run, in any unit."""

    rounds: Sequence[float]
    """Work of each round, from round 1."""
    after: float = 0.0
    """Work after the last round."""

    def seconds_left(self, last: int, seconds: Sequence[float]) -> float:
        """Estimate the seconds to the end from the fastest round, since the first one has extra work.

        Args:
            last: number of the last completed round; at least as large as the number of seconds.
            seconds: durations of the rounds up to this one.
        """
        done = self.rounds[last - len(seconds) : last]
        left = sum(self.rounds[last:]) + self.after
        return left * min(spent / work for spent, work in zip(seconds, done, strict=True))
