"""Which of the known devices are asked in a round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from protocol.messages import DeviceReport, TrainingPlan
from strategies.round.metrics import DeviceMetrics


class Sampling(NamedTuple):
    """What a selection declares of itself; under privacy one that declares nothing is refused."""

    data_independent: bool
    """Whether who is asked says nothing of anybody's pictures: it follows from names, chance and kinds of device."""
    amplifies: bool
    """Whether every device joins by itself with a fixed probability, in secret, and nobody is added for those who
    can't: then its promise is better than the noise alone gives it (Abadi et al., 2016, arXiv:1607.00133)."""
    reason: str
    uses_transient_state: bool = False
    """Whether it goes by what a device tells of its moment, such as its battery: that may be old when it is looked at,
    and where all of one device is the unit it belongs to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCandidate:
    """A device that could be asked in this round, and what asking it would come to."""

    report: DeviceReport
    plan: TrainingPlan
    """What it would be asked to do."""
    seconds: float
    """That this should take it, its transfers included."""
    joules: float
    """That training should take it."""
    ready: bool = True
    """Whether it is asked if it is picked. One that isn't is picked from only with privacy per device."""
    facts: DeviceMetrics | None = None
    """What the server remembers of all rounds before; None: it was never asked."""

    @property
    def asked(self) -> int:
        """Rounds that it was asked in, or picked for."""
        return self.facts.asked if self.facts else 0

    @property
    def last(self) -> int:
        """The last of them; 0 before any."""
        return self.facts.last if self.facts else 0

    @property
    def loss(self) -> float | None:
        """That it told last; None before, and under privacy."""
        return self.facts.loss if self.facts else None


class DeviceCandidates(dict[str, DeviceCandidate]):
    """Candidates by name.

    Attributes:
        losses: the mean loss that devices told in each round before this one; under privacy there are none.
        round: that they may be asked in.
    """

    def __init__(self, devices: Mapping[str, DeviceCandidate], losses: Iterable[float] = (), *, round: int) -> None:
        super().__init__(devices)
        self.losses, self.round = tuple(losses), round


class Selection(Protocol):
    """A rule on devices by name, so that it does not depend on how Flower numbers its nodes.

    It keeps nothing from one round to the next: a run that is resumed goes by what its checkpoint holds.
    """

    sensitivity: Sampling

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        """The devices to ask, by name, sorted.

        Args:
            draw: names its coins; an asynchronous round has several draws, each with a number of its own.
        """
        ...


class NameSelection(Protocol):
    """A rule on names alone, which serves wherever a `Selection` does."""

    sensitivity: Sampling

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:
        """The devices to ask, by name, sorted."""
        ...


def check_size(size: int) -> None:
    """ValueError for a number of devices that nobody can be asked with."""
    if size < 1:
        raise ValueError(f"{size=}: must be 1 or more")
