"""Flower's grid over HTTP, one short call at a time.

Flower's `HttpGrid.pull_messages` waits for the objects of a reply for up to two hours once its head has arrived, and
retries calls forever if the SuperLink doesn't answer. Here each call is made once, with its own time limit, and the
head of a reply and its objects are separate calls. This is the server's only module that uses private parts of Flower's
grid (flwr 1.42).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

CALL = 30.0
"""Time limit of one call, in seconds."""


class ReplyDiscarded(Exception):  # noqa: N818 - a fact about one reply, not an error of the server
    """A promised object will no longer be sent."""


class ReplyHead(NamedTuple):
    """Information about a reply that is available before its objects are pulled."""

    request: str
    """Id of the message that the reply answers."""
    reply: str
    """The reply's own id, equal to the id of its outermost object."""
    objects: tuple[str, ...]
    """Ids of all objects; if there are more than the requested maximum, one more than the maximum."""


class RuntimeGrid(HttpGrid):
    """The grid of the same run, without retries.

    Args:
        grid: the grid that Flower passes to a ServerApp.
    """

    def __init__(self, grid: HttpGrid) -> None:
        super().__init__(grid._addr, grid._insecure, grid._cert, token=grid._token)
        self._retry_invoker.max_tries = 1  # a run that was stopped still raises RunNotRunningException
        self._names: dict[int, str] = {}
        self.set_run(grid.run)

    def limit(self, seconds: float) -> None:
        """Set the time limit of each following call."""
        self._runtime_client._client.timeout = httpx.Timeout(min(CALL, max(0.2, seconds)))

    def get_nodes(self) -> Iterable[NodeInfo]:
        nodes = list(super().get_nodes())
        self._names |= {node.node_id: node.name for node in nodes if node.name}
        return nodes

    def names(self) -> Mapping[int, str]:
        """Return the names of all nodes that were ever listed; empty if the SuperLink doesn't authenticate nodes.

        They are recorded with the listing itself. If a node left right after it, the SuperLink would return no name for
        the node, which could then claim any name.
        """
        return self._names

    def push(self, message: Message) -> str:
        """Send one message, and return its id.

        Raises:
            Exception: the message could not be sent, or its objects were refused.
        """
        with no_object_id_recompute():
            (identifier,) = self.push_messages([message])
        if not identifier:
            raise ValueError("the SuperLink did not accept the message")
        return identifier

    def heads(self, identifiers: Iterable[str], *, max_objects: int) -> Iterator[ReplyHead]:
        """Yield heads of the replies that have arrived for these messages, each once.

        Args:
            max_objects: maximum number of object ids listed per reply.
        """
        response = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=list(identifiers)))
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            meta = message.metadata
            yield ReplyHead(meta.reply_to_message_id, meta.message_id, object_ids(tree, max_objects + 1))

    def object(self, identifier: str) -> bytes | None:
        """Return the content of an object; None if it has not been sent yet.

        Raises:
            ReplyDiscarded: the device stopped sending for too long, and the SuperLink has discarded the object.
        """
        run = self.run.run_id
        response = self._runtime_client.PullObject(PullObjectRequest(node=self.node, run_id=run, object_id=identifier))
        if not response.object_found:
            raise ReplyDiscarded("the device stopped sending it")
        return response.object_content if response.object_available else None

    def confirm(self, reply: str) -> None:
        """Make the SuperLink delete a reply's objects."""
        request = ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=reply)
        self._runtime_client.ConfirmMessageReceived(request)


def unpack(head: ReplyHead, contents: dict[str, bytes]) -> Message:
    """Assemble a message from its objects.

    Raises:
        Exception: any error of Flower's for invalid contents.
    """
    message = inflate_object_from_contents(head.reply, contents)
    if not isinstance(message, Message):
        raise TypeError(f"its outermost object is a {type(message).__name__}")
    message.metadata.__dict__["_message_id"] = head.reply  # Flower has no setter
    return message


def object_ids(tree: ObjectTree, max_objects: int) -> tuple[str, ...]:
    """Return ids of a tree's objects, the outermost first, at most `max_objects`."""
    ids: dict[str, None] = {}
    waiting = [tree]
    while waiting and len(ids) < max_objects:
        node = waiting.pop()
        ids[node.object_id] = None
        waiting.extend(node.children)
    return tuple(ids)
