"""Round robin: select the devices that were asked least often, and among these the least recently asked."""

from __future__ import annotations

from strategies.selection import DeviceCandidates, Sampling, check_size, selection


@selection("round_robin")
class RoundRobin:
    """Select `size` devices; names break ties.

    If all devices are always connected, no device is asked twice before every other device was asked once.

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
