"""Flower's grid with a gate: every reply is pulled by itself, so that one that can't be unpacked harms no other.

A SuperLink keeps the objects of a reply as a device pushed them and looks at their heads only. Flower's grid (flwr
1.41, `superlink/grid`) unpacks them in the ServerApp's process, all replies of a leg in one go: a body that is no JSON,
or the number of a chunk that isn't there, is an exception that ends the run and takes the other replies with it; a few
bytes that name one chunk a million times are terabytes; and the sender that a message names is what the sender wrote.
Here each of these is one device's unreadable reply.

What lies outside our reach: what a SuperLink and a SuperNode do with bytes before they hand them on (2 GiB a message,
objects without a bound on their number: limit them with the network's and the operating system's means); that a
SuperNode runs the app bundle of whoever may start runs on its federation, so its owner must trust that one with code,
or isolate it; and whose node a node is, which Flower's node authentication decides.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError

from protocol.records import UNREADABLE
from server.collect import collect, give_up
from strategies.clock import WallClock

log = logging.getLogger(__name__)

_MEMORY = 2**25  # bytes to pull and unpack a reply with, most of them stacks of the threads that do it
_COPIES = 16  # of an adapter: as pulled, as unpacked, in chunks, whole
_POLL = 3.0  # seconds between two looks for replies, as in Flower's own
_UNPACKING = (  # what Flower raises over content; anything else is about the connection
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError, MemoryError,
    DecodeError,
)  # fmt: skip


class Forwarding(Grid):
    """A grid on top of another, which it is but for `send_and_receive`."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def forget(self, message_ids: Iterable[str]) -> None:
        give_up(self._grid, message_ids)


class Gated(Forwarding):
    """A grid whose replies are unpacked one at a time and attributed to the node that was asked.

    A reply that can't be unpacked, or names another sender, arrives as that node's error `UNREADABLE`.

    Args:
        largest: bytes of the largest adapter that a reply may hold: pulling and unpacking one may take a multiple of
            it, where the operating system can be told (Linux).
        poll: seconds between two looks for replies.
    """

    def __init__(self, grid: Grid, *, largest: int, poll: float = _POLL) -> None:
        super().__init__(grid)
        self._poll = poll
        self._memory = _MEMORY + _COPIES * largest
        self._asked: dict[str, Message] = {}  # what no reply has come to yet, by message id

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        identifiers = list(self._grid.push_messages(asked))
        self._asked |= {message.metadata.message_id: _without_content(message) for message in asked}
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come to messages of this grid, each unpacked by itself."""
        for identifier in message_ids:
            if identifier in self._asked and (reply := self._reply(identifier, self._asked[identifier])) is not None:
                del self._asked[identifier]
                yield reply

    def forget(self, message_ids: Iterable[str]) -> None:
        names = set(message_ids)
        self._asked = {name: message for name, message in self._asked.items() if name not in names}
        super().forget(names)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies as they come, until there is one to each message or `timeout` seconds are over (None: no limit)."""
        clock = WallClock(poll=self._poll)
        return collect(self, messages, clock, until=clock.now() + (math.inf if timeout is None else timeout))

    def _reply(self, identifier: str, request: Message) -> Message | None:
        """The reply to one request, if it has come."""
        try:
            with memory_at_most(self._memory):
                found = list(self._grid.pull_messages([identifier]))
        except _UNPACKING as error:
            return _unreadable(request, f"{type(error).__name__} as Flower unpacked it")
        if not found:
            return None
        reply = found[0]
        if not reply.has_error() and reply.metadata.src_node_id != request.metadata.dst_node_id:
            return _unreadable(request, f"it names node {reply.metadata.src_node_id} as its sender")
        return reply


def _without_content(message: Message) -> Message:
    """What a reply is a reply to; an adapter for each device that never answers would be too much to keep."""
    kept = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
    kept.metadata.__dict__["_message_id"] = message.metadata.message_id  # there is no setter
    return kept


@contextmanager
def memory_at_most(extra: int) -> Iterator[None]:
    """Within it, taking more than `extra` bytes on top of what the process has raises MemoryError.

    On Linux; elsewhere nothing is limited. What the process has includes memory that it freed and its allocator kept,
    which can be taken again without a limit.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    import resource

    used = int(re.findall(r"VmData:\s+(\d+) kB", status.read_text())[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [used + extra, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _unreadable(request: Message, reason: str) -> Message:
    log.warning("reply of node %d: %s", request.metadata.dst_node_id, reason)
    return Message(Error(UNREADABLE, reason), reply_to=request)
