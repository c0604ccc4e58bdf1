"""State of the exchange with each node: the messages that it was given, and its reply to one of them.

The state is deliberately not persisted: a gateway ends together with its SuperLink's ServerApp, and replies to a
ServerApp that has ended are useless. A node that is sending a reply then gets a 403, and Flower's SuperNode drops it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree

from server.gateway.refusal import NOT_YOURS, RequestRefused, hostile
from server.gateway.replies import Reply, ReplyLimits, tree_objects

_REMEMBERED = 8  # messages; a SuperNode is given one at a time
_OUTSTANDING = 4  # most replies of one node that the SuperLink keeps, such as late replies
_PULLS = 32  # pulls of one object, since connections break
_PROMISES = 16  # replies begun to one message: after a server error the node begins again
_FETCHES = 16  # fetches of one run's description: a SuperNode caches it
_AHEAD = 600.0  # seconds that a device's clock may be ahead
_LONGEST_TTL = 1e9  # seconds


@dataclass
class DeliveredMessage:
    """A message that the node has pulled."""

    head: Metadata
    objects: frozenset[str]
    pulls: Counter[str] = field(default_factory=Counter)
    """Number of times that the node was given each object."""
    sent: set[str] = field(default_factory=set)
    """Objects that the server has finished sending; an earlier confirmation would make the server's own push fail."""
    promises: int = 0
    """Number of replies begun."""
    confirmed: bool = False
    answered: str | None = None
    """Id of the reply that was handed on."""


@dataclass
class NodeExchange:
    """The exchange with one node."""

    node: int
    given: OrderedDict[str, DeliveredMessage] = field(default_factory=OrderedDict)
    reply: Reply | None = None
    outstanding: deque[tuple[int, str]] = field(default_factory=deque)
    """Run and id of each reply that was handed on, the oldest first."""
    forwarded_session: str = ""
    """Session of the last reply that was handed on."""
    fetched: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of requests for each run and its app."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def record_delivery(self, head: Message, tree: ObjectTree) -> None:
        """Note that the node has pulled a message."""
        names, waiting = set(), [tree]
        while waiting:
            found = waiting.pop()
            names.add(found.object_id)
            waiting += found.children
        self.given[head.metadata.message_id] = DeliveredMessage(head.metadata, frozenset(names))
        while len(self.given) > _REMEMBERED:
            self.given.popitem(last=False)

    def message(self, identifier: str, run: int) -> DeliveredMessage:
        """Return a message that this node was given in this run. Refusal if there is none."""
        found = self.given.get(identifier)
        if found is None or found.head.run_id != run:
            raise RequestRefused(NOT_YOURS, "a message that this node wasn't given")
        return found

    def check_run(self, run: int, what: str) -> None:
        """Refuse to describe a run that this node doesn't take part in, or to describe a run too often."""
        if not any(given.head.run_id == run for given in self.given.values()):
            raise RequestRefused(NOT_YOURS, "a run that this node takes no part in")
        self.fetched[what, run] += 1
        if self.fetched[what, run] > _FETCHES:
            raise hostile("the same run again and again")

    def find_object(self, identifier: str, run: int) -> DeliveredMessage:
        """Find the message of an object that the node asks for. Refusal if there is none."""
        for given in reversed(self.given.values()):
            if given.head.run_id == run and identifier in given.objects:
                if given.pulls[identifier] >= _PULLS:
                    raise hostile("the same object again and again")
                return given
        raise RequestRefused(NOT_YOURS, "an object of no message of this node's")

    def begin(self, request: PushMessagesRequest, bound: ReplyLimits, folder: Path) -> Reply | None:
        """Begin a reply that a node starts to send; None if this reply was handed on already.

        Raises:
            Refusal: it doesn't answer a message of this node, or is malformed.
        """
        if (len(request.messages_list), len(request.message_object_trees)) != (1, 1):
            raise hostile("other than one reply at a time")
        head, tree = request.messages_list[0], request.message_object_trees[0]
        given = self.message(head.metadata.reply_to_message_id, head.metadata.run_id)
        _check_head(head, given.head, self.node)
        objects = tree_objects(tree, bound.objects)
        if head.metadata.message_id != tree.object_id:
            raise hostile("a reply whose id isn't that of its root")
        if given.answered is not None:
            if given.answered != tree.object_id:
                raise hostile("a second reply to one message")
            return None
        if self.reply is not None and self.reply.identifier == tree.object_id and self.reply.tree == tree:
            return self.reply  # the answer was lost, or the node resumes
        given.promises += 1
        if given.promises > _PROMISES:
            raise hostile("one reply begun after another")
        if self.reply is not None:
            self.drop(self.reply)
        runtime = request.clientapp_runtime_list[0] if len(request.clientapp_runtime_list) == 1 else 0.0
        runtime = runtime if math.isfinite(runtime) and 0 <= runtime < _LONGEST_TTL else 0.0
        self.reply = Reply(_rebuilt(head), tree, runtime, objects, bound, folder)
        return self.reply

    def mark_forwarded(self, reply: Reply) -> tuple[int, str] | None:
        """Note that the SuperLink has a reply.

        Returns:
            Run and id of an older reply to remove from the SuperLink, if the node has too many.
        """
        metadata = reply.head.metadata
        self.drop(reply)
        self.forwarded_session = reply.session
        if (given := self.given.get(metadata.reply_to_message_id)) is not None:
            given.answered = reply.identifier
        self.outstanding.append((metadata.run_id, reply.identifier))
        return self.outstanding.popleft() if len(self.outstanding) > _OUTSTANDING else None

    def drop(self, reply: Reply) -> None:
        """Forget a reply that will not be completed."""
        reply.close()
        if self.reply is reply:
            self.reply = None

    def close(self) -> None:
        if self.reply is not None:
            self.drop(self.reply)


def _check_head(head: Message, asked: Metadata, node: int) -> None:
    metadata = head.metadata
    if metadata.src_node_id != node or metadata.dst_node_id != asked.src_node_id:
        raise hostile("a reply in the name of another node")
    if (metadata.message_type, metadata.group_id) != (asked.message_type, asked.group_id):
        raise hostile("a reply of another kind than its message")
    if head.content.ByteSize():
        raise hostile("a reply with its content in its head")
    near = asked.created_at - _AHEAD <= metadata.created_at <= time.time() + _AHEAD
    if not (near and 0 < metadata.ttl <= _LONGEST_TTL):
        raise RequestRefused(NOT_YOURS, "a reply whose times can't be: set the device's clock")


def _rebuilt(head: Message) -> Message:
    """Copy the fields of a reply's head, and no others."""
    kept, metadata = Message(), head.metadata
    for name in (
        "run_id",
        "message_id",
        "src_node_id",
        "dst_node_id",
        "reply_to_message_id",
        "group_id",
        "message_type",
        "created_at",
        "ttl",
    ):
        setattr(kept.metadata, name, getattr(metadata, name))
    if head.HasField("error"):
        kept.error.CopyFrom(head.error)
    else:
        kept.content.SetInParent()
    return kept
