"""Which of the known devices are asked in a round."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol


class Sampling(NamedTuple):
    """What a selection declares of itself; under privacy one that declares nothing is refused."""

    blind: bool
    """Whether who is asked says nothing of anybody's pictures: it follows from names and chance alone."""
    amplifies: bool
    """Whether every device joins by itself with a fixed probability, in secret, and nobody is added for those who
    can't: then its promise is better than the noise alone gives it (Abadi et al., 2016, arXiv:1607.00133)."""
    reason: str


class Selection(Protocol):
    """A rule on names, so that it does not depend on how Flower numbers its nodes."""

    sensitivity: Sampling

    def select(self, devices: Collection[str], *, round: int) -> list[str]:
        """The devices to ask, by name, sorted."""
        ...
