"""Requests of a training round, and the accepted updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from models.lora.adapter import Adapter
from protocol.messages import DeviceReport, TrainingPlan, Update
from strategies.round.update_spool import UpdateKey, UpdateSpool
from strategies.scaffold import ControlUpdate

Sketches = list[tuple[str, Tensor]]
"""Device name and sketch [sites, 1 + n] of each update that arrived in the current round, accepted or not."""


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """Training requests that were sent, to validate the replies against."""

    adapter: Adapter
    """Adapter that was sent, as decoded by the devices."""
    plans: Mapping[int, tuple[DeviceReport, TrainingPlan]]
    """Report and plan of each device, by node."""
    not_contacted: tuple[str, ...] = ()
    """Names of the selected devices that could not be contacted. Under device-level privacy they count as asked."""
    bytes_down: int
    control_update: ControlUpdate | None
    """Update of the server's control variate; None without SCAFFOLD."""
    residual: Mapping[str, Tensor]
    """Quantization residual of the adapter that was sent, to be added to the next one."""
    sent_at: float | None = None
    """Time of sending on the strategy's clock; None if devices' seconds are not those of that clock."""


class RoundUpdates:
    """Accepted updates of a round: metadata in memory, factors on disk.

    Args:
        reserved_bytes: disk space to reserve for the factors.

    Attributes:
        adapters: factors of the updates.
        bytes_up: payload size of each update.
        sketches: sketches for the replay filter.
        told: largest ε that a device's ledger reported.
    """

    def __init__(self, reserved_bytes: int = 0) -> None:
        self.adapters = UpdateSpool(reserved_bytes)
        self.bytes_up: dict[UpdateKey, int] = {}
        self.sketches: Sketches = []
        self.told: float | None = None
        self._updates: dict[UpdateKey, Update] = {}

    def __enter__(self) -> RoundUpdates:
        return self

    def __exit__(self, *_: object) -> None:
        self.adapters.close()

    def add(self, update: Update, adapter: Adapter) -> None:
        """Add an update. Raises ReplyRejectedError if the disk is full."""
        key = update.device, update.round
        self.adapters.add(key, adapter)
        self.bytes_up[key], self._updates[key] = len(update.adapter), replace(update, adapter=b"")

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def updates(self) -> list[Update]:
        """Updates without factors, in the order of `adapters`."""
        return [self._updates[key] for key in self.adapters.keys]
