"""Flower's own SuperLink state and request handlers, called without HTTP, and fake nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from server.grid.validating_grid import ValidatingGrid


class SuperLinkHarness:
    """A SuperLink's state with one run.

    Attributes:
        calls: called with the name of each call of the ServerApp, before the call.
    """

    def __init__(self, folder: Path) -> None:
        database = str(folder / "superlink.db")
        factory = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database))
        self.state = factory.state()
        self.run = self.state.create_run(
            "app", "1", "hash", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        self._numbers = count(1)
        self.calls: Callable[[str], None] = lambda _: None

    def device(self, name: str) -> FakeNode:
        """Register and activate a node with this name."""
        node = self.state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, f"key {next(self._numbers)}".encode(), 30.0, name=name
        )
        self.state.activate_node(node, 30.0)
        return FakeNode(self, node, name)

    def grid(self, *, largest: int = 1 << 20) -> ValidatingGrid:
        """Return the grid of a ServerApp."""
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = self.run, 1, SUPERLINK_NODE_ID
        grid = HttpGrid(token="token")
        (run,) = self.state.get_run_info(run_ids=[self.run])
        grid.set_run(run)
        gate = ValidatingGrid(grid, largest=largest, poll=0.01)
        gate._calls._client = _RuntimeHandlers(self)
        return gate


class _RuntimeHandlers:
    """Replaces Flower's client of the runtime API."""

    def __init__(self, link: SuperLinkHarness) -> None:
        self._link = link
        self._client = SimpleNamespace(timeout=None)
        self._task = SimpleNamespace(run_id=link.run)

    def __getattr__(self, call: str) -> Callable[[Any], Any]:
        handler = {
            "PushMessages": runtime_handlers.push_messages,
            "PullMessages": runtime_handlers.pull_messages,
            "PushObject": runtime_handlers.push_object,
            "PullObject": runtime_handlers.pull_object,
            "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
            "GetNodes": runtime_handlers.get_nodes,
        }[call]

        def call_handler(request: Any) -> Any:
            self._link.calls(call)
            return handler(request, self._link.state, self._task)

        return call_handler


@dataclass(eq=False)
class FakeNode:
    """A node that sends arbitrary replies."""

    link: SuperLinkHarness
    node: int
    name: str

    def pull(self) -> Message:
        """Pull the next message, with its content."""
        (head,) = self.link.state.get_message_ins(node_id=self.node, limit=1)
        tree = self.link.state.object_store.get_object_tree(head.metadata.message_id)
        contents = {
            part.object_id: self.link.state.get_object(self.link.run, part.object_id)
            for part in iterate_object_tree(tree)
        }
        message = inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return message

    def reply(self, message: Message, content: RecordDict) -> Message:
        request, now = message.metadata, time.time()
        metadata = Metadata(
            run_id=request.run_id,
            message_id="",
            src_node_id=self.node,
            dst_node_id=request.src_node_id,
            reply_to_message_id=request.message_id,
            group_id=request.group_id,
            created_at=now,
            ttl=1000.0,
            message_type=request.message_type,
        )
        reply = make_message(metadata=metadata, content=content)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def push(self, reply: Message, *, objects: int | None = None, tree: ObjectTree | None = None) -> Callable[[], None]:
        """Send a reply's head, tree and first objects (None: all); return a function that sends the others."""
        state = self.link.state
        session = state.start_session(self.link.run)
        head = remove_content_from_message(reply)
        _, wanted = state.store_message_and_object_tree(head, tree or get_object_tree(reply), session)
        nested = get_all_nested_objects(reply)

        def send(names: list[str]) -> None:
            for name in names:
                if name in nested:
                    assert state.store_object(self.link.run, session, name, nested[name].deflate())

        send(wanted[:objects])
        return lambda: send([] if objects is None else wanted[objects:])
