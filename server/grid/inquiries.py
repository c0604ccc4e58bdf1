"""Queries to nodes that don't block the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from flwr.app import Message

from server.rounds.collect import TimeLimitedGrid

log = logging.getLogger(__name__)


class Asking(TimeLimitedGrid, Protocol):
    """Operations that queries need from a grid (`server.grid.validating_grid.ValidatingGrid`)."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Note that no reply to these messages will be pulled."""
        ...

    def exclude_node(self, node: int) -> None:
        """Leave a node out for a while."""
        ...


class PendingQueries:
    """Pending queries, until they are answered or expire; at most one per node.

    Args:
        poll: seconds between two polls for answers.
        slack: additional seconds that a poll may take.
    """

    def __init__(self, grid: Asking, *, poll: float, slack: float) -> None:
        self._grid, self._poll, self._slack = grid, poll, slack
        self._asked: dict[int, tuple[str, float]] = {}  # by node: the message's id, and when it was sent

    def ask(self, messages: Iterable[Message], *, timeout: float, wait: float) -> Iterator[Message]:
        """Send queries, and yield answers to these and to earlier ones, as `server.grid.validating_grid.ValidatingGrid.query_nodes`."""
        new = [message for message in messages if message.metadata.dst_node_id not in self._asked]
        now = time.monotonic()
        for message, name in zip(new, self._grid.push(new, timeout), strict=True):
            self._asked[message.metadata.dst_node_id] = name, now
        while True:
            nodes = {name: node for node, (name, _) in self._asked.items()}
            for name, reply in self._grid.pull(nodes, self._poll + self._slack):
                del self._asked[nodes[name]]
                yield reply
            now = time.monotonic()
            for node, (name, since) in list(self._asked.items()):
                if now >= since + timeout:
                    log.warning("node %d did not answer in %.0f s", node, timeout)
                    self._grid.exclude_node(node)
                    self._grid.forget([name])
                    del self._asked[node]
            left = max((since + wait - now for _, since in self._asked.values()), default=0.0)
            if left <= 0:
                return
            time.sleep(min(self._poll, left))
