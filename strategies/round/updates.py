"""What a round asked for, and the good updates that have come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from models.lora.adapter import Adapter
from protocol.messages import DeviceReport, TrainingPlan, Update
from strategies.robust.replay import Sketches
from strategies.round.update_spool import UpdateKey, UpdateSpool
from strategies.scaffold import ControlUpdate


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """What was sent for training, to hold the replies against."""

    adapter: Adapter
    plans: Mapping[int, tuple[DeviceReport, TrainingPlan]]
    not_contacted: tuple[str, ...] = ()
    """Names of the devices that were picked and could not be asked: with privacy per device they count as asked."""
    bytes_down: int
    control_update: ControlUpdate | None
    """Of devices that correct for it."""
    lost: Mapping[str, Tensor]
    """What rounding took of the adapter on its way, for the next one."""
    sent_at: float | None = None
    """When it was sent, on the strategy's clock; None where devices' seconds are not those of that clock."""


class RoundUpdates:
    """The good updates of a round, one after another: what they tell here, their factors on disk.

    Args:
        room: bytes there that are held for them.

    `sketches` is for whoever looks for replays, and `told` the largest ε that a device's ledger told of.
    """

    def __init__(self, room: int = 0) -> None:
        self.adapters = UpdateSpool(room)
        self.bytes_up: dict[UpdateKey, int] = {}
        self.sketches: Sketches = []
        self.told: float | None = None
        self._updates: dict[UpdateKey, Update] = {}

    def __enter__(self) -> RoundUpdates:
        return self

    def __exit__(self, *_: object) -> None:
        self.adapters.close()

    def add(self, update: Update, adapter: Adapter) -> None:
        """One more. RefusedError if there is no room for it."""
        key = update.device, update.round
        self.adapters.add(key, adapter)
        self.bytes_up[key], self._updates[key] = len(update.adapter), replace(update, adapter=b"")

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def updates(self) -> list[Update]:
        """Without their factors, in the order of those."""
        return [self._updates[key] for key in self.adapters.keys]
