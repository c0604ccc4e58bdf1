"""Outcomes of the work of a simulated fleet, with the causes of missing replies, which the server doesn't know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KILLED, DROPPED, OFF = "killed: memory", "dropped out", "off"  # stored; don't change
"""Causes of lost work besides `device_model.FLAT` and `device_model.LEFT`: out of memory, random dropout, not switched
on."""


@dataclass(frozen=True, kw_only=True)
class FleetRound:
    """Outcomes of one round; zeros for round 0. Stored: the field names are the format."""

    number: int
    ended: float
    """Time on the fleet's clock, in seconds."""
    joules: float
    """Energy drawn by working devices, including work that was lost."""
    drained: float = 0.0
    """Energy in joules that working devices drew from their batteries."""
    lost: dict[str, int] = field(default_factory=dict)
    """Number of devices that were asked and did not reply, by cause."""


class FleetLog:
    """Outcomes of completed rounds and of the current one."""

    def __init__(self, rounds: tuple[FleetRound, ...] = ()) -> None:
        self.rounds = rounds
        self._reset()

    def _reset(self) -> None:
        self._joules, self._drained, self._lost = 0.0, 0.0, Counter[str]()

    def add_energy(self, joules: float, *, drained: float) -> None:
        """Add the energy of one task; `drained` is the part from the battery, in joules."""
        self._joules += joules
        self._drained += drained

    def add_lost(self, cause: str) -> None:
        self._lost[cause] += 1

    def close(self, number: int, time: float) -> None:
        """Complete a round."""
        lost = dict(sorted(self._lost.items()))
        completed = FleetRound(number=number, ended=time, joules=self._joules, drained=self._drained, lost=lost)
        self.rounds = (*self.rounds, completed)
        self._reset()


def gini(counts: list[int]) -> float:
    """Return the Gini coefficient of participation counts: 0 if all are equal, near 1 if a single device participated.

    Half the mean absolute difference of two counts over their mean (Gini, 1912), including devices that never
    participated. 0 if no device participated.
    """
    ordered, total = sorted(counts), sum(counts)
    if not total:
        return 0.0
    return sum((2 * rank - len(ordered) + 1) * count for rank, count in enumerate(ordered)) / (len(ordered) * total)
