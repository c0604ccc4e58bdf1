"""Selection of the devices that are asked in a round.

Each module registers its selection as `@selection("name")`. The parameters `size`, `seed`, `deadline`, `rate` and `rng`
of its constructor are filled in from the rest of the configuration; others are its options (`strategies.declarations`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.plugins import Registry
from protocol.messages import DeviceReport, TrainingPlan
from strategies.round.metrics import DeviceMetrics

SELECTIONS: Registry[Any] = Registry("selection", key="selection", modules=__name__)
selection = SELECTIONS.register


class Sampling(NamedTuple):
    """Sensitivity declaration of a selection. A selection without one is refused under privacy."""

    data_independent: bool
    """Whether the selection is independent of the devices' pictures: it depends on names, chance and device type."""
    amplifies: bool
    """Whether every device takes part independently with a fixed probability, in secret, and no device is added for one
    that can't. Then the guarantee is better than that of the noise (Abadi et al., 2016, arXiv:1607.00133)."""
    reason: str
    uses_transient_state: bool = False
    """Whether selection uses transient device state (e.g. battery level). The state may be stale, and under
    device-level privacy it is private."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCandidate:
    """Device that could be asked in this round, and its predicted cost."""

    report: DeviceReport
    plan: TrainingPlan
    """Plan that the device would be sent."""
    seconds: float
    """Predicted time, including transfers."""
    joules: float
    """Predicted energy of training."""
    ready: bool = True
    """Whether the device is asked if it is selected. Other devices are candidates only under device-level privacy."""
    metrics: DeviceMetrics | None = None
    """Its metrics of all earlier rounds; None if it was never asked."""

    @property
    def asked(self) -> int:
        """Number of rounds that the device was asked in or selected for."""
        return self.metrics.asked if self.metrics else 0

    @property
    def last(self) -> int:
        """Latest round that the device was asked in or selected for; 0 if none."""
        return self.metrics.last if self.metrics else 0

    @property
    def loss(self) -> float | None:
        """Latest reported loss; None if none was reported, and under privacy."""
        return self.metrics.loss if self.metrics else None


class DeviceCandidates(dict[str, DeviceCandidate]):
    """Candidates by name.

    Args:
        devices: candidates by name.
        losses: mean loss that devices reported in each earlier round; empty under privacy.
        round: number of the round that they may be asked in.
    """

    def __init__(self, devices: Mapping[str, DeviceCandidate], losses: Iterable[float] = (), *, round: int) -> None:
        super().__init__(devices)
        self.losses, self.round = tuple(losses), round


class Selection(Protocol):
    """Selection of devices by name, so that it does not depend on Flower's node ids.

    It has no state between rounds: everything that a resumed run needs is in its checkpoint. A class may also declare
    `options` and `conflicts` (`strategies.declarations`), and `chosen_by`, the key that selects it in place of
    `selection`.
    """

    sensitivity: Sampling

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        """Return the names of the selected devices, sorted.

        Args:
            devices: candidates by name.
            draw: number of the random stream. An asynchronous round has several draws, each with its own number.
        """
        ...


class NameSelection(Protocol):
    """Selection that needs only names, and can be used as a `Selection`."""

    sensitivity: Sampling

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:
        """Return the names of the selected devices, sorted."""
        ...


def uses_transient_state(selection: Selection) -> bool:
    """Return whether a selection declares that it uses transient device state; True if it declares nothing."""
    declared: Sampling | None = getattr(selection, "sensitivity", None)
    return declared is None or declared.uses_transient_state


def amplifies(selection: Selection) -> bool:
    """Return whether a selection declares that it amplifies privacy; False if it declares nothing."""
    declared: Sampling | None = getattr(selection, "sensitivity", None)
    return declared is not None and declared.amplifies


def check_size(size: int) -> None:
    """Raise ValueError for a number of devices below 1."""
    if size < 1:
        raise ValueError(f"{size=}: must be 1 or more")
