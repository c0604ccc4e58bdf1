"""Select the same devices in every round, so that evaluations of consecutive adapters are comparable."""

from __future__ import annotations

from collections.abc import Collection

from common.seeding import derive_seed
from strategies.selection import Sampling


class FixedPanel:
    """Select `size` devices, or all if there are fewer; only an absent device is replaced.

    With a new sample each round, the mean would vary more with the sample than with the adapter.

    Args:
        size: number of devices.
        seed: seed of the run.
    """

    sensitivity = Sampling(data_independent=True, amplifies=False, reason="fixed size, from a public seed")

    def __init__(self, *, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"{size=}: must be 1 or more")
        self._size, self._seed = size, seed

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:  # noqa: ARG002
        return sorted(sorted(devices, key=lambda name: derive_seed(self._seed, "panel", name))[: self._size])
