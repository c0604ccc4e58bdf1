"""Select every connected device."""

from __future__ import annotations

from collections.abc import Collection

from strategies.selection import Sampling, selection


@selection("everyone")
class Everyone:
    """Select all devices in every round."""

    sensitivity = Sampling(data_independent=True, amplifies=False, reason="participation is public")
    chosen_by = "cohort.size=null"

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:  # noqa: ARG002
        return sorted(devices)
