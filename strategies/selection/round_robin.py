"""Ask in turn: whoever was asked least often, and of these whoever was asked longest ago."""

from __future__ import annotations

from strategies.selection import DeviceCandidates, Sampling, check_size


class RoundRobin:
    """`size` devices; names break ties. Of devices that are always there none is asked twice before all were once."""

    sensitivity = Sampling(
        data_independent=True, amplifies=False, reason="by how often, and when, each was asked, over whoever is there"
    )

    def __init__(self, *, size: int) -> None:
        check_size(size)
        self._size = size

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:  # noqa: ARG002
        turns = sorted(devices, key=lambda name: (devices[name].asked, devices[name].last, name))
        return sorted(turns[: self._size])
