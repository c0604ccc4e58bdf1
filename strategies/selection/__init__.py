"""Which of the known devices are asked in a round."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Selection(Protocol):
    """A pure rule on names, so that it does not depend on how Flower numbers its nodes."""

    def select(self, devices: Collection[str], *, round: int) -> list[str]:
        """The devices to ask, by name, sorted."""
        ...
