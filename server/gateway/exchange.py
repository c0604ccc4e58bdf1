"""State of the exchange with each node: the messages that it has pulled, and its reply to one of them.

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
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree

from server.gateway.calls import Call
from server.gateway.refusal import NOT_YOURS, RequestRefused, hostile
from server.gateway.replies import Reply, ReplyLimits, tree_objects

_REMEMBERED = 8  # messages; a SuperNode gets one at a time
_OUTSTANDING = 4  # maximum replies of one node in the SuperLink, such as late replies
_PULLS = 32  # pulls of one object, since connections break
_PROMISES = 16  # replies begun to one message: after a server error, the node begins again
_FETCHES = 16  # fetches of one run's description: a SuperNode caches it
_AHEAD = 600.0  # maximum seconds by which a device's clock may be ahead
_LONGEST_TTL = 1e9  # seconds


@dataclass
class DeliveredMessage:
    """A message that the node has pulled."""

    head: Metadata
    objects: frozenset[str]
    pulls: Counter[str] = field(default_factory=Counter)
    """Number of times that the node has pulled each object."""
    sent: set[str] = field(default_factory=set)
    """Objects that the server has finished sending; an earlier confirmation would make the server's own push fail."""
    promises: int = 0
    """Number of replies begun."""
    confirmed: bool = False
    answered: str | None = None
    """Id of the reply that was forwarded to the SuperLink."""


@dataclass
class NodeExchange:
    """The exchange with one node."""

    node: int
    delivered: OrderedDict[str, DeliveredMessage] = field(default_factory=OrderedDict)
    reply: Reply | None = None
    outstanding: deque[tuple[int, str]] = field(default_factory=deque)
    """Run and id of each forwarded reply, the oldest first."""
    forwarded_session: str = ""
    """Session of the last forwarded reply."""
    fetched: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of requests for each run and its app."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def request(self, call: Call, **fields: Any) -> Any:
        """Make a request on behalf of the node."""
        request: Any = call.request(**fields)
        request.node.node_id = self.node
        return request

    def record_delivery(self, head: Message, tree: ObjectTree) -> None:
        """Record that the node has pulled a message."""
        names, waiting = set(), [tree]
        while waiting:
            node = waiting.pop()
            names.add(node.object_id)
            waiting += node.children
        self.delivered[head.metadata.message_id] = DeliveredMessage(head.metadata, frozenset(names))
        while len(self.delivered) > _REMEMBERED:
            self.delivered.popitem(last=False)

    def find_message(self, identifier: str, run: int) -> DeliveredMessage:
        """Return a message that this node has pulled in this run.

        Raises:
            RequestRefused: there is none.
        """
        delivered = self.delivered.get(identifier)
        if delivered is None or delivered.head.run_id != run:
            raise RequestRefused(NOT_YOURS, "a message that this node hasn't pulled")
        return delivered

    def check_run(self, run: int, kind: str) -> None:
        """Count a request for the description of a run.

        Args:
            run: id of the run.
            kind: `run` or `app`.

        Raises:
            RequestRefused: the node has pulled no message of the run, or has asked too often.
        """
        if not any(delivered.head.run_id == run for delivered in self.delivered.values()):
            raise RequestRefused(NOT_YOURS, "a run without a message that this node has pulled")
        self.fetched[kind, run] += 1
        if self.fetched[kind, run] > _FETCHES:
            raise hostile("the same run again and again")

    def find_object(self, identifier: str, run: int) -> DeliveredMessage:
        """Find the message of an object that the node asks for.

        Raises:
            RequestRefused: there is none, or the node has pulled the object too often.
        """
        for delivered in reversed(self.delivered.values()):
            if delivered.head.run_id == run and identifier in delivered.objects:
                if delivered.pulls[identifier] >= _PULLS:
                    raise hostile("the same object again and again")
                return delivered
        raise RequestRefused(NOT_YOURS, "an object of none of this node's messages")

    def begin(self, request: PushMessagesRequest, limits: ReplyLimits, folder: Path) -> Reply | None:
        """Begin to receive a node's reply; return None if this reply was already forwarded.

        Args:
            request: head of the reply and the tree of its objects.
            limits: limits on the reply.
            folder: spool folder.

        Raises:
            RequestRefused: it doesn't answer a message of this node, or is malformed.
        """
        if (len(request.messages_list), len(request.message_object_trees)) != (1, 1):
            raise hostile("other than one reply at a time")
        head, tree = request.messages_list[0], request.message_object_trees[0]
        delivered = self.find_message(head.metadata.reply_to_message_id, head.metadata.run_id)
        _check_head(head, delivered.head, self.node)
        objects = tree_objects(tree, limits.objects)
        if head.metadata.message_id != tree.object_id:
            raise hostile("a reply whose id isn't that of its root")
        if delivered.answered is not None:
            if delivered.answered != tree.object_id:
                raise hostile("a second reply to one message")
            return None
        if self.reply is not None and self.reply.identifier == tree.object_id and self.reply.tree == tree:
            return self.reply  # the answer was lost, or the node resumes
        delivered.promises += 1
        if delivered.promises > _PROMISES:
            raise hostile("one reply begun after another")
        if self.reply is not None:
            self.drop(self.reply)
        runtime = request.clientapp_runtime_list[0] if len(request.clientapp_runtime_list) == 1 else 0.0
        runtime = runtime if math.isfinite(runtime) and 0 <= runtime < _LONGEST_TTL else 0.0
        self.reply = Reply(_copy_head(head), tree, runtime, objects, limits, folder)
        return self.reply

    def mark_forwarded(self, reply: Reply) -> tuple[int, str] | None:
        """Record that the SuperLink has stored a reply.

        Returns:
            Run and id of an older reply to remove from the SuperLink, if the node has too many.
        """
        metadata = reply.head.metadata
        self.drop(reply)
        self.forwarded_session = reply.session
        if (delivered := self.delivered.get(metadata.reply_to_message_id)) is not None:
            delivered.answered = reply.identifier
        self.outstanding.append((metadata.run_id, reply.identifier))
        return self.outstanding.popleft() if len(self.outstanding) > _OUTSTANDING else None

    def drop(self, reply: Reply) -> None:
        """Drop a reply that will not be completed."""
        reply.close()
        if self.reply is reply:
            self.reply = None

    def close(self) -> None:
        if self.reply is not None:
            self.drop(self.reply)


def _check_head(head: Message, request: Metadata, node: int) -> None:
    metadata = head.metadata
    if metadata.src_node_id != node or metadata.dst_node_id != request.src_node_id:
        raise hostile("a reply in the name of another node")
    if (metadata.message_type, metadata.group_id) != (request.message_type, request.group_id):
        raise hostile("a reply of another kind than its message")
    if head.content.ByteSize():
        raise hostile("a reply with its content in its head")
    near = request.created_at - _AHEAD <= metadata.created_at <= time.time() + _AHEAD
    if not (near and 0 < metadata.ttl <= _LONGEST_TTL):
        raise RequestRefused(NOT_YOURS, "a reply with impossible times: set the device's clock")


def _copy_head(head: Message) -> Message:
    """Copy the known fields of a reply's head, and no others."""
    copy, metadata = Message(), head.metadata
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
        setattr(copy.metadata, name, getattr(metadata, name))
    if head.HasField("error"):
        copy.error.CopyFrom(head.error)
    else:
        copy.content.SetInParent()
    return copy
