"""Temporary exclusion of nodes after failed messages to them or failed replies from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

FIRST, LONGEST = 30.0, 1800.0
"""Seconds that a node is excluded after its first failure, and the maximum; each further failure doubles the time."""
WAIT_FACTOR = 4.0
"""Exclusion as a multiple of the time that others waited for the node, so that it costs at most a fifth of theirs."""


class NodeBackoff:
    """Excluded nodes, with the end of each exclusion.

    Args:
        now: returns the current time in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._until: dict[int, float] = {}
        self._length: dict[int, float] = {}

    def add(self, node: int, waited: float = 0.0) -> float:
        """Exclude a node from now on, and return the exclusion's length in seconds.

        Args:
            waited: seconds that others waited for the node in vain.
        """
        doubled = min(LONGEST, 2 * self._length[node]) if node in self._length else FIRST
        self._length[node] = max(doubled, WAIT_FACTOR * waited)
        self._until[node] = self._now() + self._length[node]
        return self._length[node]

    def clear(self, node: int) -> None:
        """Reset a node's failures after it sent a valid reply."""
        self._until.pop(node, None)
        self._length.pop(node, None)

    def available(self, nodes: Iterable[int]) -> list[int]:
        """Return the nodes that are not excluded now."""
        now = self._now()
        return [node for node in nodes if self._until.get(node, now) <= now]
