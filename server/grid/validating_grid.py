"""Flower's grid with a gate: every message is sent and every reply is pulled by itself, in a limited time.

A SuperLink keeps the objects of a reply as a device pushed them and looks at their heads only. Flower's grid (flwr
1.42, `superlink/grid`) unpacks them in the ServerApp's process, all replies of a leg in one go: a body that is no JSON,
or the number of a chunk that isn't there, is an exception that ends the run and takes the other replies with it; a few
bytes that name one chunk a million times are terabytes; the sender that a message names is what the sender wrote; and a
reply whose objects never come holds up all others for hours. Here each of these is one node's failure, and that node
is left out for a while:

    malformed      the reply can't be unpacked, or names another sender
    unreachable    the message could not be sent, or no more than a part of the reply came
    silent         nothing came in time, several times in a row: others wait for it, round after round

What lies outside our reach: what a SuperLink and a SuperNode do with bytes before they hand them on (`server.gateway`
limits what devices may send); that a SuperNode runs the app bundle of whoever may start runs on its federation, so its
owner must trust that one with code, or isolate it; and whose node a node is, which Flower's node authentication
decides.
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
from server.grid.arrivals import IncomingReplies
from server.grid.forwarding import ForwardingGrid
from server.grid.inquiries import PendingQueries
from server.grid.pauses import NodeBackoff
from server.grid.runtime_grid import ReplyDiscarded, RuntimeGrid
from server.rounds.collect import collect
from server.supervisor.memory_limit import memory_limit
from strategies.clock import WallClock

log = logging.getLogger(__name__)

_MEMORY = 2**25  # bytes to pull and unpack a reply with, most of them stacks of the threads that do it
_COPIES = 16  # of an adapter: as pulled, as unpacked, in chunks, whole
_OBJECTS = 64  # of a reply, beside the chunks of its adapter
_POLL = 3.0  # seconds between two looks for replies, as in Flower's own
_TRIES = 3  # looks that may fail until a reply is given up
_MISSES = 3  # messages in a row that may have no reply at the end of their time until a node is left out
_PATIENCE = 60.0  # seconds that the SuperLink may be away when it is asked who is there
_SLACK = 0.5  # seconds after the end of its time that a call may end
_UNPACKING = (  # what Flower raises over content, where it pulls and unpacks in one
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
    """A grid that no node can hold up or break.

    A message that can't be sent, or a reply that can't be had or read, arrives as an error of its node.

    Args:
        grid: of a ServerApp; of another kind of grid, which pulls and unpacks in one, single calls are not limited.
        largest: bytes of the largest adapter that a reply may hold: pulling and unpacking one may take a multiple of
            it, where the operating system can be told (Linux).
        poll: seconds between two looks for replies.
    """

    def __init__(self, grid: Grid, *, largest: int, poll: float = _POLL) -> None:
        self._calls = RuntimeGrid(grid) if isinstance(grid, HttpGrid) else None
        super().__init__(self._calls or grid)
        self._arrivals = IncomingReplies(self._calls, most=_OBJECTS + 2 * largest // CHUNK) if self._calls else None
        self._poll = poll
        self._memory = _MEMORY + _COPIES * largest
        self._asked: dict[str, Message] = {}  # what no reply has come to yet, by message id
        self._unsent: dict[str, Message] = {}  # errors in place of replies to what could not be sent
        self._left: set[str] = set()  # given-up messages that the SuperLink still holds
        self._failed: Counter[str] = Counter()  # looks for each reply that failed
        self._sent: dict[str, float] = {}  # when each message was sent
        self._missed: Counter[int] = Counter()  # messages to each node, since its last reply, that had none in time
        self._inquiries = PendingQueries(self, poll=poll, slack=_SLACK)
        self._pauses = NodeBackoff()
        self._silent = False  # the SuperLink did not answer the last time
        self._numbers = count(1)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are there, but for those that are left out for a while."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._limit(_PATIENCE)
                found = self._pauses.available(self._grid.get_node_ids())
                self._clear()  # before a round, and not within its time limit
                return found
            except httpx.HTTPError as error:
                if time.monotonic() >= until:
                    raise
                log.warning("the SuperLink doesn't say who is there (%s); asking again", error)
                time.sleep(self._poll)

    def names(self) -> Mapping[int, str]:
        """Names that the nodes which `get_node_ids` has found were registered under, as far as it is known."""
        return self._calls.names() if self._calls else {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.push(messages, math.inf)

    def push(self, messages: Iterable[Message], seconds: float) -> list[str]:
        """Send each message by itself; their ids, also of those that could not be sent.

        Args:
            seconds: after which no further one is sent.
        """
        until = time.monotonic() + seconds
        return [self._pushed(message, until) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return (reply for _, reply in self.pull(message_ids, math.inf))

    def pull(self, message_ids: Iterable[str], seconds: float, *, last: bool = False) -> Iterator[tuple[str, Message]]:
        """Replies that are whole, each with the id of the message that it answers, small ones first.

        Args:
            seconds: for all of it.
            last: nobody looks again: a reply that is not whole by now is its node's error.
        """
        until = time.monotonic() + seconds
        waiting = [name for name in dict.fromkeys(message_ids) if name in self._asked]
        for name in waiting:
            if name in self._unsent:
                yield name, self._over(name, self._unsent.pop(name))
        waiting = [name for name in waiting if name in self._asked]
        found = self._whole(waiting, until) if self._arrivals else self._unpacked(waiting)
        for name, reply in found:
            yield name, self._over(name, reply)
        if last and self._arrivals:
            for name in self._arrivals.with_head(waiting):
                self._arrivals.drop([name])
                yield name, self._over(name, self._unreachable(name, "it promised a reply and did not send all of it"))
        if last and not self._silent:
            for name in waiting:
                if name in self._asked:
                    self._miss(name)

    def came(self, message_ids: Iterable[str]) -> set[str]:
        """Those of these messages that there is a reply to, which is thrown away."""
        names = [name for name in message_ids if name in self._asked]
        if self._arrivals is None:
            came = {name for name, _ in self.pull(names, math.inf)}
        else:
            try:
                self._limit(_SLACK)
                self._arrivals.poll_heads(names)
            except httpx.TransportError:
                return set()
            came = set(self._arrivals.with_head(names))
        self.forget(came)
        return came

    def forget(self, message_ids: Iterable[str]) -> None:
        names = set(message_ids)
        self._left |= names & (self._asked.keys() - self._unsent.keys())
        for kept in (self._asked, self._unsent, self._failed, self._sent):
            for name in names & kept.keys():
                del kept[name]
        if self._arrivals:
            self._arrivals.drop(names)
        super().forget(names)

    def _clear(self) -> None:
        """Have the SuperLink delete messages whose replies are given up: nodes that never take any fill its disk."""
        until = time.monotonic() + _SLACK
        with suppress(httpx.HTTPError):  # the rest next time
            while self._calls and self._left and time.monotonic() < until:
                identifier = next(iter(self._left))
                self._calls.confirm(identifier)
                self._left.remove(identifier)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies as they come, until there is one to each message or `timeout` seconds are over (None: no limit)."""
        clock = WallClock(poll=self._poll)
        return collect(self, messages, clock, until=clock.now() + (math.inf if timeout is None else timeout))

    def query_nodes(self, messages: Iterable[Message], *, timeout: float, wait: float) -> Iterator[Message]:
        """Replies to questions that nobody has to wait for: one that comes later is handed out by a later call.

        A node that has not answered after `timeout` is left out for a while. While it hasn't, it is not asked again.

        Args:
            timeout: seconds that an answer may take.
            wait: seconds after a question that are waited for its answer.
        """
        return self._inquiries.ask(messages, timeout=timeout, wait=wait)

    def exclude_node(self, node: int, waited: float = 0.0) -> None:
        """Leave a node out for a while, for which others waited so many seconds in vain."""
        log.warning("node %d is left out for %.0f s", node, self._pauses.add(node, waited))

    def _miss(self, name: str) -> None:
        """Count a message that has no reply at the end of its time."""
        node = self._asked[name].metadata.dst_node_id
        self._missed[node] += 1
        if self._missed[node] >= _MISSES:
            log.warning("node %d has not replied in time %d times in a row", node, self._missed[node])
            self.exclude_node(node, time.monotonic() - self._sent[name])

    def _pushed(self, message: Message, until: float) -> str:
        """The id of a message that was sent, or of one in whose place its node's error is going to arrive."""
        request = _without_content(message)
        try:
            if time.monotonic() > until:
                raise TimeoutError("no time was left to send it")
            self._limit(until - time.monotonic() + _SLACK)
            identifier = self._calls.push(message) if self._calls else next(iter(self._grid.push_messages([message])))
        except Exception as error:
            identifier = f"unsent-{next(self._numbers)}"
            blamed = not isinstance(error, (httpx.TransportError, TimeoutError))
            self._asked[identifier] = request
            self._unsent[identifier] = self._unreachable(identifier, f"sending: {_said(error)}", blamed=blamed)
        request.metadata.__dict__["_message_id"] = identifier  # there is no setter
        self._asked[identifier], self._sent[identifier] = request, time.monotonic()
        return identifier

    def _whole(self, waiting: list[str], until: float) -> Iterator[tuple[str, Message]]:
        """Replies from a SuperLink: heads first, then the objects of those that are all there."""
        assert self._arrivals is not None
        try:
            self._limit(until - time.monotonic() + _SLACK)
            wrong = self._arrivals.poll_heads(waiting)
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
                    yield name, self._unreachable(name, _said(error))
                except Exception as error:
                    yield name, self._unreadable(name, f"{type(error).__name__} as Flower unpacked it")
                else:
                    if reply is not None:
                        yield name, self._attributed(name, reply)
        except httpx.TransportError as error:  # of the SuperLink itself: no node's doing
            if not self._silent:
                log.warning("the SuperLink doesn't answer (%s); looking again", _said(error))
            self._silent = True
            return
        self._silent = False
        yield from self._given_up(wrong)

    def _unpacked(self, waiting: list[str]) -> Iterator[tuple[str, Message]]:
        """Replies from a grid that unpacks what it pulls."""
        for name in waiting:
            try:
                with memory_limit(self._memory):
                    found = list(self._grid.pull_messages([name]))
            except _UNPACKING as error:
                yield name, self._unreadable(name, f"{type(error).__name__} as Flower unpacked it")
            except Exception as error:
                yield from self._given_up({name: error})
            else:
                if found:
                    yield name, self._attributed(name, found[0])

    def _given_up(self, wrong: Mapping[str, Exception]) -> Iterator[tuple[str, Message]]:
        """Of looks that failed, those that failed too often."""
        for name, error in wrong.items():
            self._failed[name] += 1
            if self._failed[name] >= _TRIES:
                yield name, self._unreachable(name, f"its reply can't be had: {_said(error)}")

    def _attributed(self, name: str, reply: Message) -> Message:
        """A reply, if it is of the node that was asked."""
        node = self._asked[name].metadata.dst_node_id
        if reply.has_error():
            return Message(reply.error, reply_to=self._asked[name])
        if reply.metadata.src_node_id != node:
            return self._unreadable(name, f"it names node {reply.metadata.src_node_id} as its sender")
        self._pauses.clear(node)
        self._missed.pop(node, None)
        return reply

    def _over(self, name: str, reply: Message) -> Message:
        self._asked.pop(name, None)
        self._failed.pop(name, None)
        self._sent.pop(name, None)
        return reply

    def _unreadable(self, name: str, reason: str) -> Message:
        request = self._asked[name]
        log.warning("reply of node %d: %s", request.metadata.dst_node_id, reason)
        return Message(Error(UNREADABLE, reason), reply_to=request)

    def _unreachable(self, name: str, reason: str, *, blamed: bool = True) -> Message:
        request = self._asked[name]
        node = request.metadata.dst_node_id
        log.warning("node %d is unreachable: %s", node, reason)
        if blamed:
            self.exclude_node(node)
        return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), reply_to=request)

    def _limit(self, seconds: float) -> None:
        if self._calls:
            self._calls.limit(seconds)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {summary(error)}"


def _without_content(message: Message) -> Message:
    """What a reply is a reply to; an adapter for each device that never answers would be too much to keep."""
    kept = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
    kept.metadata.__dict__["_message_id"] = message.metadata.message_id  # there is no setter
    return kept
