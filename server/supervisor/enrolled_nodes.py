"""Register enrolled devices as nodes of the SuperLink."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from server.gateway.device_registry import DeviceRegistry
from server.supervisor.superlink import SuperLinkProcess


@dataclass
class EnrolledNodes:
    """Map from enrolled devices to nodes of the SuperLink.

    Without certificates, the SuperLink doesn't authenticate nodes and stores no names.
    """

    registry: DeviceRegistry
    superlink: SuperLinkProcess
    _ids: dict[str, int] = field(default_factory=dict)  # by public key
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._ids)

    def node_of(self, key: str) -> int | None:
        """Return the id of the node with this public key."""
        return self._ids.get(key)

    def reconcile(self) -> None:
        """Make the SuperLink's nodes equal the enrolled devices of the registry."""
        if self.superlink.certificates is None:
            return
        with self._lock:
            control = self.superlink.control
            nodes, devices = control.nodes(), self.registry.snapshot().active_devices()
            for key in nodes.keys() - devices.keys():
                control.unregister(nodes.pop(key))
            for key in devices.keys() - nodes.keys():
                nodes[key] = control.register(key, devices[key].name)
            self._ids = nodes

    def remove_revoked(self) -> None:
        """Remove revoked devices from the SuperLink; the gateway refuses them already."""
        if self._ids.keys() - self.registry.snapshot().active_devices().keys():
            self.reconcile()

    def register_node(self, key: str, name: str) -> None:
        """Register a newly enrolled device with the SuperLink."""
        with self._lock:
            if key not in self._ids:
                self._ids = {**self._ids, key: self.superlink.control.register(key, name)}
