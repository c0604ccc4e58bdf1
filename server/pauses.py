"""Nodes that are left out for a while, because messages to them or replies from them failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

FIRST, LONGEST = 30.0, 1800.0
"""Seconds that a node is left out after its first failure, and at most; twice as long after each further one."""
TIMES = 4.0
"""How many times as long as it was waited for in vain: so it costs others a fifth of their time at most."""


class Pauses:
    """Which nodes are left out, and until when.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._until: dict[int, float] = {}
        self._length: dict[int, float] = {}

    def add(self, node: int, waited: float = 0.0) -> float:
        """Leave a node out from now on; for how many seconds.

        Args:
            waited: seconds that others waited for it in vain.
        """
        usual = min(LONGEST, 2 * self._length[node]) if node in self._length else FIRST
        self._length[node] = max(usual, TIMES * waited)
        self._until[node] = self._now() + self._length[node]
        return self._length[node]

    def clear(self, node: int) -> None:
        """Forget a node's failures: it sent a good reply."""
        self._until.pop(node, None)
        self._length.pop(node, None)

    def without(self, nodes: Iterable[int]) -> list[int]:
        """Those that are not left out now."""
        now = self._now()
        return [node for node in nodes if self._until.get(node, now) <= now]
