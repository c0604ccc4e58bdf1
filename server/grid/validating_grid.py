"""Grid that validates replies: every message is sent and every reply is pulled separately, with a time limit.

A SuperLink stores the objects of a reply as a device pushed them, and checks only their heads. Flower's grid (flwr
1.42, `superlink/grid`) unpacks all replies of a step at once, in the ServerApp's process:

- A body that is not JSON, or a missing chunk, raises an exception that ends the run and loses the other replies.
- A few bytes that name one chunk a million times expand to terabytes.
- The sender of a message is not authenticated: a node can name any other.
- A reply whose objects never arrive blocks all others for hours.

Here each of these is a failure of one node, which is excluded for a while:

    malformed      the reply can't be unpacked, or names another sender
    unreachable    the message could not be sent, or only a part of the reply arrived
    silent         no reply arrived in time, several times in a row: others would wait for the node in each round

Out of scope: processing of bytes inside a SuperLink and a SuperNode (`server.gateway` limits the calls of devices).
A SuperNode runs the app bundle of anyone who may start runs on its federation, so its owner must trust them with code
or isolate it. Flower's node authentication decides who owns a node.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError

from common.errors import summary
from protocol.records import UNREADABLE
from server.grid.backoff import NodeBackoff
from server.grid.forwarding import ForwardingGrid
from server.grid.incoming_replies import IncomingReplies
from server.grid.pending_queries import PendingQueries
from server.grid.runtime_grid import ReplyDiscarded, RuntimeGrid
from server.rounds.collect import collect
from server.supervisor.memory_limit import memory_limit
from strategies.clock import WallClock

log = logging.getLogger(__name__)

_MEMORY = 2**25  # bytes to pull and unpack a reply, mostly stacks of the threads that do it
_COPIES = 16  # copies of an adapter in memory: as pulled, as unpacked, in chunks, complete
_OBJECTS = 64  # objects of a reply besides the chunks of its adapter
_POLL = 3.0  # seconds between two polls for replies, as in Flower's own grid
_TRIES = 3  # failed polls after which a reply is abandoned
_MISSES = 3  # messages in a row without a reply in time after which a node is excluded
_PATIENCE = 60.0  # seconds to retry listing the nodes while the SuperLink is unavailable
_SLACK = 0.5  # seconds after the end of its time limit within which a call may end
_UNPACKING = (  # errors that Flower raises over content, for a grid that pulls and unpacks in one step
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    MemoryError,
    DecodeError,
)


class ValidatingGrid(ForwardingGrid):
    """A grid that no node can block or break.

    A message that can't be sent, or a reply that can't be received or unpacked, is returned as an error of its node.

    Args:
        grid: the grid of a ServerApp. Any other kind of grid pulls and unpacks in one step, without a limit on single
            calls.
        largest: size in bytes of the largest adapter in a reply. Pulling and unpacking may use a multiple of it, where
            the operating system can enforce this (Linux).
        poll: seconds between two polls for replies.
    """

    def __init__(self, grid: Grid, *, largest: int, poll: float = _POLL) -> None:
        self._calls = RuntimeGrid(grid) if isinstance(grid, HttpGrid) else None
        super().__init__(self._calls or grid)
        self._arrivals = (
            IncomingReplies(self._calls, max_objects=_OBJECTS + 2 * largest // CHUNK) if self._calls else None
        )
        self._poll = poll
        self._memory = _MEMORY + _COPIES * largest
        self._pending: dict[str, Message] = {}  # messages without a reply, by message id
        self._unsent: dict[str, Message] = {}  # error replies to messages that could not be sent
        self._abandoned: set[str] = set()  # abandoned messages that the SuperLink still stores
        self._failed: Counter[str] = Counter()  # number of failed polls for each reply
        self._sent: dict[str, float] = {}  # time at which each message was sent
        self._missed: Counter[int] = Counter()  # messages to each node without a reply in time, since its last reply
        self._queries = PendingQueries(self, poll=poll, slack=_SLACK)
        self._backoff = NodeBackoff()
        self._unavailable = False  # whether the SuperLink failed to answer the last call
        self._numbers = count(1)

    def get_node_ids(self) -> Iterable[int]:
        """List the connected nodes that are not excluded."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._limit(_PATIENCE)
                nodes = self._backoff.available(self._grid.get_node_ids())
                self._delete_abandoned()  # before a round, outside its time limit
                return nodes
            except httpx.HTTPError as error:
                if time.monotonic() >= until:
                    raise
                log.warning("the SuperLink doesn't list its nodes (%s); retrying", error)
                time.sleep(self._poll)

    def names(self) -> Mapping[int, str]:
        """Return registered names of the nodes that `get_node_ids` has listed, as far as known."""
        return self._calls.names() if self._calls else {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.push(messages, math.inf)

    def push(self, messages: Iterable[Message], seconds: float) -> list[str]:
        """Send each message separately, and return their ids, including those that could not be sent.

        Args:
            seconds: time after which no further message is sent.
        """
        until = time.monotonic() + seconds
        return [self._push(message, until) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return (reply for _, reply in self.pull(message_ids, math.inf))

    def pull(self, message_ids: Iterable[str], seconds: float, *, last: bool = False) -> Iterator[tuple[str, Message]]:
        """Yield complete replies, each with the id of its request, small ones first.

        Args:
            message_ids: ids of the requests.
            seconds: time limit of the whole call.
            last: whether there is no further poll: an incomplete reply becomes its node's error.
        """
        until = time.monotonic() + seconds
        waiting = [name for name in dict.fromkeys(message_ids) if name in self._pending]
        for name in waiting:
            if name in self._unsent:
                yield name, self._finish(name, self._unsent.pop(name))
        waiting = [name for name in waiting if name in self._pending]
        replies = self._pull_complete(waiting, until) if self._arrivals else self._pull_unpacked(waiting)
        for name, reply in replies:
            yield name, self._finish(name, reply)
        if last and self._arrivals:
            for name in self._arrivals.with_head(waiting):
                self._arrivals.drop([name])
                failure = self._unreachable(name, "it promised a reply but did not send all of it")
                yield name, self._finish(name, failure)
        if last and not self._unavailable:
            for name in waiting:
                if name in self._pending:
                    self._count_miss(name)

    def discard_replies(self, message_ids: Iterable[str]) -> set[str]:
        """Discard the replies that have arrived for these messages, and return the ids of their requests."""
        names = [name for name in message_ids if name in self._pending]
        if self._arrivals is None:
            arrived = {name for name, _ in self.pull(names, math.inf)}
        else:
            try:
                self._limit(_SLACK)
                self._arrivals.poll_heads(names)
            except httpx.TransportError:
                return set()
            arrived = set(self._arrivals.with_head(names))
        self.forget(arrived)
        return arrived

    def forget(self, message_ids: Iterable[str]) -> None:
        """Stop waiting for replies to these messages."""
        names = set(message_ids)
        self._abandoned |= names & (self._pending.keys() - self._unsent.keys())
        for table in (self._pending, self._unsent, self._failed, self._sent):
            for name in names & table.keys():
                del table[name]
        if self._arrivals:
            self._arrivals.drop(names)
        super().forget(names)

    def _delete_abandoned(self) -> None:
        """Make the SuperLink delete abandoned messages: otherwise nodes that never pull would fill its disk."""
        until = time.monotonic() + _SLACK
        with suppress(httpx.HTTPError):  # the next call deletes the others
            while self._calls and self._abandoned and time.monotonic() < until:
                identifier = next(iter(self._abandoned))
                self._calls.confirm(identifier)
                self._abandoned.remove(identifier)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Yield replies as they arrive, until every message has one or after `timeout` seconds (None: no limit)."""
        clock = WallClock(poll=self._poll)
        return collect(self, messages, clock, until=clock.now() + (math.inf if timeout is None else timeout))

    def query_nodes(self, messages: Iterable[Message], *, timeout: float, wait: float) -> Iterator[Message]:
        """Send queries without blocking on slow nodes, and yield answers to these and to earlier queries.

        A node that doesn't answer within `timeout` is excluded for a while. Until then, it isn't queried again.

        Args:
            messages: at most one query per node.
            timeout: maximum seconds for an answer.
            wait: seconds to wait after sending a query.
        """
        return self._queries.query(messages, timeout=timeout, wait=wait)

    def exclude_node(self, node: int, waited: float = 0.0) -> None:
        """Exclude a node for a while, depending on the seconds that others waited for it in vain."""
        log.warning("node %d is excluded for %.0f s", node, self._backoff.add(node, waited))

    def _count_miss(self, name: str) -> None:
        """Count a message that had no reply at the end of its time limit."""
        node = self._pending[name].metadata.dst_node_id
        self._missed[node] += 1
        if self._missed[node] >= _MISSES:
            log.warning("node %d has not replied in time %d times in a row", node, self._missed[node])
            self.exclude_node(node, time.monotonic() - self._sent[name])

    def _push(self, message: Message, until: float) -> str:
        """Send a message and return its id; if that fails, return an id under which the node's error is pulled."""
        request = _without_content(message)
        try:
            if time.monotonic() > until:
                raise TimeoutError("no time left to send it")
            self._limit(until - time.monotonic() + _SLACK)
            identifier = self._calls.push(message) if self._calls else next(iter(self._grid.push_messages([message])))
        except Exception as error:
            identifier = f"unsent-{next(self._numbers)}"
            blamed = not isinstance(error, (httpx.TransportError, TimeoutError))
            self._pending[identifier] = request
            self._unsent[identifier] = self._unreachable(identifier, f"sending: {_describe(error)}", blamed=blamed)
        request.metadata.__dict__["_message_id"] = identifier  # Flower has no setter
        self._pending[identifier], self._sent[identifier] = request, time.monotonic()
        return identifier

    def _pull_complete(self, waiting: list[str], until: float) -> Iterator[tuple[str, Message]]:
        """Yield replies from a SuperLink: heads first, then the replies whose objects have all arrived."""
        assert self._arrivals is not None
        try:
            self._limit(until - time.monotonic() + _SLACK)
            errors = self._arrivals.poll_heads(waiting)
            for name in self._arrivals.with_head(waiting):
                if time.monotonic() > until + _SLACK:
                    break
                self._limit(until - time.monotonic() + _SLACK)
                try:
                    with memory_limit(self._memory):
                        reply = self._arrivals.pull(name)
                except httpx.TransportError:
                    raise
                except (ReplyDiscarded, httpx.HTTPError) as error:
                    yield name, self._unreachable(name, _describe(error))
                except Exception as error:
                    yield name, self._unreadable(name, f"{type(error).__name__} as Flower unpacked it")
                else:
                    if reply is not None:
                        yield name, self._check_sender(name, reply)
        except httpx.TransportError as error:  # the SuperLink itself fails: no node is to blame
            if not self._unavailable:
                log.warning("the SuperLink doesn't answer (%s); retrying", _describe(error))
            self._unavailable = True
            return
        self._unavailable = False
        yield from self._abandon(errors)

    def _pull_unpacked(self, waiting: list[str]) -> Iterator[tuple[str, Message]]:
        """Yield replies from a grid that unpacks while it pulls."""
        for name in waiting:
            try:
                with memory_limit(self._memory):
                    replies = list(self._grid.pull_messages([name]))
            except _UNPACKING as error:
                yield name, self._unreadable(name, f"{type(error).__name__} as Flower unpacked it")
            except Exception as error:
                yield from self._abandon({name: error})
            else:
                if replies:
                    yield name, self._check_sender(name, replies[0])

    def _abandon(self, errors: Mapping[str, Exception]) -> Iterator[tuple[str, Message]]:
        """Count failed polls, and yield errors for messages that failed too often."""
        for name, error in errors.items():
            self._failed[name] += 1
            if self._failed[name] >= _TRIES:
                yield name, self._unreachable(name, f"its reply can't be pulled: {_describe(error)}")

    def _check_sender(self, name: str, reply: Message) -> Message:
        """Return a reply if its sender is the node that was asked; otherwise an error."""
        node = self._pending[name].metadata.dst_node_id
        if reply.has_error():
            return Message(reply.error, reply_to=self._pending[name])
        if reply.metadata.src_node_id != node:
            return self._unreadable(name, f"it names node {reply.metadata.src_node_id} as its sender")
        self._backoff.clear(node)
        self._missed.pop(node, None)
        return reply

    def _finish(self, name: str, reply: Message) -> Message:
        self._pending.pop(name, None)
        self._failed.pop(name, None)
        self._sent.pop(name, None)
        return reply

    def _unreadable(self, name: str, reason: str) -> Message:
        request = self._pending[name]
        log.warning("reply of node %d: %s", request.metadata.dst_node_id, reason)
        return Message(Error(UNREADABLE, reason), reply_to=request)

    def _unreachable(self, name: str, reason: str, *, blamed: bool = True) -> Message:
        request = self._pending[name]
        node = request.metadata.dst_node_id
        log.warning("node %d is unreachable: %s", node, reason)
        if blamed:
            self.exclude_node(node)
        return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), reply_to=request)

    def _limit(self, seconds: float) -> None:
        if self._calls:
            self._calls.limit(seconds)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {summary(error)}"


def _without_content(message: Message) -> Message:
    """Return a message's metadata, enough to reply to it; adapters for silent devices would take too much memory."""
    bare = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
    bare.metadata.__dict__["_message_id"] = message.metadata.message_id  # Flower has no setter
    return bare
