"""Ask every device that is there."""

from __future__ import annotations

from collections.abc import Collection

from strategies.selection import Sampling


class Everyone:
    """All devices, every round."""

    sensitivity = Sampling(data_independent=True, amplifies=False, reason="everybody knows who takes part")

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:  # noqa: ARG002
        return sorted(devices)
