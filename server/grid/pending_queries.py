"""Send queries to nodes without blocking the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from flwr.app import Message

from server.rounds.collect import TimeLimitedGrid

log = logging.getLogger(__name__)


class _QueryGrid(TimeLimitedGrid, Protocol):
    """Operations that queries need from a grid (`server.grid.validating_grid.ValidatingGrid`)."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Stop waiting for replies to these messages."""
        ...

    def exclude_node(self, node: int) -> None:
        """Exclude a node for a while."""
        ...


class PendingQueries:
    """Pending queries, until they are answered or expire; at most one per node.

    Args:
        poll: seconds between two polls for answers.
        slack: additional seconds that a poll may take.
    """

    def __init__(self, grid: _QueryGrid, *, poll: float, slack: float) -> None:
        self._grid, self._poll, self._slack = grid, poll, slack
        self._pending: dict[int, tuple[str, float]] = {}  # by node: the message's id, and when it was sent

    def query(self, messages: Iterable[Message], *, timeout: float, wait: float) -> Iterator[Message]:
        """Send queries, and yield answers to these and to earlier ones.

        Args:
            messages: queries; nodes with a pending query are skipped.
            timeout: maximum seconds for an answer, after which the node is excluded.
            wait: seconds to wait after sending a query.
        """
        new = [message for message in messages if message.metadata.dst_node_id not in self._pending]
        now = time.monotonic()
        for message, name in zip(new, self._grid.push(new, timeout), strict=True):
            self._pending[message.metadata.dst_node_id] = name, now
        while True:
            nodes = {name: node for node, (name, _) in self._pending.items()}
            for name, reply in self._grid.pull(nodes, self._poll + self._slack):
                del self._pending[nodes[name]]
                yield reply
            now = time.monotonic()
            for node, (name, sent) in list(self._pending.items()):
                if now >= sent + timeout:
                    log.warning("node %d did not answer in %.0f s", node, timeout)
                    self._grid.exclude_node(node)
                    self._grid.forget([name])
                    del self._pending[node]
            remaining = max((sent + wait - now for _, sent in self._pending.values()), default=0.0)
            if remaining <= 0:
                return
            time.sleep(min(self._poll, remaining))
