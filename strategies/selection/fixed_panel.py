"""Ask the same devices every round: what they measure of one adapter can then be compared with the next."""

from __future__ import annotations

from collections.abc import Collection

from common.seeding import derive_seed
from strategies.selection import Sampling


class FixedPanel:
    """`size` devices, or all if there are fewer; one that is away is stood in for, and nobody else changes place.

    Of a fresh sample each round, the mean says more of who was asked than of the adapter.
    """

    sensitivity = Sampling(
        data_independent=True, amplifies=False, reason="of fixed size, from a seed that is no secret"
    )

    def __init__(self, *, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"{size=}: must be 1 or more")
        self._size, self._seed = size, seed

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:  # noqa: ARG002
        return sorted(sorted(devices, key=lambda name: derive_seed(self._seed, "panel", name))[: self._size])
