"""Devices that the register lets in, made known to the SuperLink as its nodes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from server.register import Register
from server.superlink import SuperLink


@dataclass
class Members:
    """Which node of the SuperLink each enrolled device is.

    Without certificates the SuperLink authenticates nobody, and knows no names.
    """

    register: Register
    superlink: SuperLink
    _ids: dict[str, int] = field(default_factory=dict)  # by public key
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._ids)

    def node_of(self, key: str) -> int | None:
        """The id of the node with this public key."""
        return self._ids.get(key)

    def reconcile(self) -> None:
        """Have the SuperLink know whom the register knows, and nobody else."""
        if self.superlink.certificates is None:
            return
        with self._lock:
            control = self.superlink.control
            there, members = control.nodes(), self.register.look().inside()
            for key in there.keys() - members.keys():
                control.unregister(there.pop(key))
            for key in members.keys() - there.keys():
                there[key] = control.register(key, members[key].name)
            self._ids = there

    def shut_out(self) -> None:
        """Have the SuperLink forget who was revoked; the gateway has shut them out already."""
        if self._ids.keys() - self.register.look().inside().keys():
            self.reconcile()

    def welcome(self, key: str, name: str) -> None:
        """Have the SuperLink know a device that has just been enrolled."""
        with self._lock:
            if key not in self._ids:
                self._ids = {**self._ids, key: self.superlink.control.register(key, name)}
