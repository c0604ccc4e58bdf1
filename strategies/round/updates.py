"""Accepted updates of a training round."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from models.lora.adapter import Adapter
from protocol.messages import Update
from strategies.round.update_spool import UpdateKey, UpdateSpool

Sketches = list[tuple[str, Tensor]]
"""Device name and sketch [sites, 1 + n] of each update that arrived in the current round, accepted or not."""


class RoundUpdates:
    """Accepted updates of a round: metadata in memory, factors on disk.

    Args:
        reserved_bytes: disk space to reserve for the factors.

    Attributes:
        max_epsilon: ε per picture that the plans of this run explain; None without example-level privacy.
        adapters: factors of the updates.
        bytes_up: payload size of each update.
        sketches: sketches for the replay filter.
        told: largest ε that a device's ledger reported.
    """

    def __init__(self, reserved_bytes: int = 0, *, max_epsilon: float | None = None) -> None:
        self.max_epsilon = max_epsilon
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
