"""Round robin: select the devices that were asked least often, and among these those asked longest ago."""

from __future__ import annotations

from strategies.selection import DeviceCandidates, Sampling, check_size


class RoundRobin:
    """Select `size` devices; names break ties. If all are always present, none is asked twice before all were once.

    Args:
        size: number of devices.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by how often and when each was asked, among connected devices",
    )

    def __init__(self, *, size: int) -> None:
        check_size(size)
        self._size = size

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:  # noqa: ARG002
        queue = sorted(devices, key=lambda name: (devices[name].asked, devices[name].last, name))
        return sorted(queue[: self._size])
