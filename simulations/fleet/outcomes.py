"""What really became of a simulated fleet's work: the server sees that no reply came, and here is why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KILLED, DROPPED, OFF = "killed: memory", "dropped out", "off"
"""Beside `life.FLAT` and `life.LEFT`: it needed more memory than it has; it vanished for no reason; it wasn't on."""


@dataclass(frozen=True, kw_only=True)
class FleetRound:
    """One round of a fleet's life; of round 0, nothing."""

    number: int
    ended: float
    """Seconds of the fleet's clock."""
    joules: float
    """That devices drew while they were at work, also for nothing."""
    drained: float = 0.0
    """Joules that batteries gave while their devices were at work."""
    lost: dict[str, int] = field(default_factory=dict)
    """Devices that were asked and never replied, by what became of them."""


class FleetLog:
    """Rounds that are over, and what has come of the one under way."""

    def __init__(self, rounds: tuple[FleetRound, ...] = ()) -> None:
        self.rounds = rounds
        self._begin()

    def _begin(self) -> None:
        self._joules, self._drained, self._lost = 0.0, 0.0, Counter[str]()

    def spent(self, joules: float, *, drained: float) -> None:
        """So much was drawn, and so much of it from batteries."""
        self._joules += joules
        self._drained += drained

    def lost(self, reason: str) -> None:
        self._lost[reason] += 1

    def close(self, number: int, time: float) -> None:
        """A round is over."""
        lost = dict(sorted(self._lost.items()))
        facts = FleetRound(number=number, ended=time, joules=self._joules, drained=self._drained, lost=lost)
        self.rounds = (*self.rounds, facts)
        self._begin()


def gini(counts: list[int]) -> float:
    """Of how often each took part: 0, all equally; towards 1, one alone. 0 if nobody did.

    Half the mean difference of two of them over their mean (Gini, 1912), of those that never did as well.
    """
    ordered, total = sorted(counts), sum(counts)
    if not total:
        return 0.0
    return sum((2 * place - len(ordered) + 1) * count for place, count in enumerate(ordered)) / (len(ordered) * total)
