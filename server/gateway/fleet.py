"""Server side of Flower's fleet protocol: each call is checked, and issued as a new call to the SuperLink."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import Reconnect
from google.protobuf.message import Message
from starlette.concurrency import run_in_threadpool

from server.gateway import calls
from server.gateway.calls import Call
from server.gateway.conversations import DeliveredMessage, NodeExchange
from server.gateway.refusal import LATER, NOT_YOURS, UNKNOWN, RequestRefused, hostile
from server.gateway.replies import Reply, ReplyLimits
from server.gateway.superlink_client import Answer, SuperLinkClient

log = logging.getLogger(__name__)

_CONVERSATIONS = 4096
_STALLED = 600.0  # seconds without an object
_TRIES = 10  # attempts to hand on a reply that the SuperLink doesn't store


class Caller(NamedTuple):
    """The authenticated node that sent a request."""

    key: str
    """Public key in OpenSSH's form."""
    pem: bytes
    headers: Mapping[str, str]
    """Headers that authenticate the node to the SuperLink. They sign the time, so they are valid for several calls."""
    node: int | None
    """Node id; None if nodes have no keys (without TLS) and the node hasn't registered yet."""


class SuperLinkError(Exception):
    """A refusal by the SuperLink, passed on to the device."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass
class FleetService:
    """All conversations with nodes.

    Args:
        superlink: client of the SuperLink.
        bound: limits on a reply of the run.
        folder: spool folder for incoming replies.
        registering: whether nodes register themselves (without TLS and keys).
        spool_bytes: most bytes of all incoming replies together.
    """

    superlink: SuperLinkClient
    bound: Callable[[], ReplyLimits]
    folder: Path
    registering: bool = False
    spool_bytes: int = 4 << 30
    conversations: OrderedDict[str, NodeExchange] = field(default_factory=OrderedDict)

    async def execute_call(self, call: Call, message: Any, caller: Caller) -> Message:
        """Answer one call.

        Raises:
            Refusal: the gateway refuses the call.
            Passed: the SuperLink refuses the call.
        """
        if call in (calls.REGISTER, calls.ACTIVATE):
            return await self._come(call, message, caller)
        conversation = self._conversation(caller)
        if call in (calls.DEACTIVATE, calls.UNREGISTER):
            return await self._leave(call, message, caller, conversation)
        if message.node.node_id != conversation.node:
            raise hostile("another node's id", UNKNOWN)
        handlers: dict[Call, Callable[[Any, Caller, NodeExchange], Awaitable[Message]]] = {
            calls.HEARTBEAT: self._heartbeat,
            calls.PULL_MESSAGES: self._pull_messages,
            calls.GET_RUN: self._get_run,
            calls.GET_FAB: self._get_fab,
            calls.PULL_OBJECT: self._pull_object,
            calls.CONFIRM: self._confirm,
            calls.PUSH_MESSAGES: self._push_messages,
            calls.PUSH_OBJECT: self._push_object,
        }
        return await handlers[call](message, caller, conversation)

    async def _come(self, call: Call, message: Any, caller: Caller) -> Message:
        if message.public_key != caller.pem:
            raise hostile("another node's key", UNKNOWN)
        if call is calls.REGISTER:
            if not self.registering:
                raise hostile("nodes of this federation are enrolled, and don't register")
            found = await self._ask(call, calls.REGISTER.request(public_key=caller.pem), caller)
        else:
            if caller.node is None and not self.registering:
                raise RequestRefused(LATER, "the federation is starting")
            asked = call.request(public_key=caller.pem, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            found = await self._ask(call, asked, caller)
        self._begin(caller.key, found.node_id)
        return found

    async def _leave(self, call: Call, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        if message.node_id != conversation.node:
            raise hostile("another node's id", UNKNOWN)
        if call is calls.UNREGISTER and not self.registering:
            raise hostile("nodes of this federation are enrolled, and don't register")
        return await self._ask(call, call.request(node_id=conversation.node), caller)

    async def _heartbeat(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        del message
        return await self._ask(
            calls.HEARTBEAT,
            _request(calls.HEARTBEAT, conversation, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL),
            caller,
        )

    async def _pull_messages(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        del message
        async with conversation.lock:
            found = await self._ask(calls.PULL_MESSAGES, _request(calls.PULL_MESSAGES, conversation), caller)
            earlier = [name for name, given in conversation.given.items() if not given.confirmed]
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                conversation.record_delivery(head, tree)
            if found.messages_list:  # the node is done with the previous one: its objects would stay forever
                for name in earlier:
                    with contextlib.suppress(SuperLinkError, RequestRefused):
                        await self._confirm_for(name, conversation.given.get(name), caller, conversation)
        return found

    async def _get_run(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        conversation.check_run(message.run_id, "run")
        return await self._ask(calls.GET_RUN, _request(calls.GET_RUN, conversation, run_id=message.run_id), caller)

    async def _get_fab(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        conversation.check_run(message.run_id, "app")
        if len(message.hash_str) > 64:
            raise hostile("a hash that is none")
        asked = _request(calls.GET_FAB, conversation, run_id=message.run_id, hash_str=message.hash_str)
        return await self._ask(calls.GET_FAB, asked, caller)

    async def _pull_object(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        given = conversation.find_object(message.object_id, message.run_id)
        found = await self._object(message.run_id, message.object_id, caller, conversation)
        if found.object_available:
            given.pulls[message.object_id] += 1
            given.sent.add(message.object_id)
        return found

    async def _confirm(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        given = conversation.message(message.message_object_id, message.run_id)
        async with conversation.lock:
            if not await self._confirm_for(message.message_object_id, given, caller, conversation):
                raise hostile("receipt of a message that isn't there yet", LATER)
        return calls.CONFIRM.response()

    async def _confirm_for(
        self, name: str, given: DeliveredMessage | None, caller: Caller, conversation: NodeExchange
    ) -> bool:
        """Confirm a message's receipt, so that the SuperLink removes it; False if the server is still sending it.

        A SuperNode doesn't pull objects that it already holds, so the gateway checks for the others.
        """
        if given is None or given.confirmed:
            return True
        for identifier in given.objects - given.sent:
            found = await self._object(given.head.run_id, identifier, caller, conversation)
            if found.object_found and not found.object_available:
                return False
            given.sent.add(identifier)
        await self._remove(given.head.run_id, name, caller, conversation)
        given.confirmed = True
        return True

    async def _push_messages(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        del caller
        async with conversation.lock:
            if conversation.reply is None:
                self._make_room()
            reply = conversation.begin(message, self.bound(), self.folder)
            head = message.messages_list[0]
            response = calls.PUSH_MESSAGES.response(reconnect=Reconnect(reconnect=5))
            response.results[head.metadata.message_id] = 0
            if reply is None:
                return response
            response.session_id = reply.session
            # All objects, even those that the SuperLink holds: devices must not learn which it holds.
            response.objects_to_push.extend(reply.objects)
            return response

    async def _push_object(self, message: Any, caller: Caller, conversation: NodeExchange) -> Message:
        async with conversation.lock:
            reply = conversation.reply
            if reply is None or reply.session != message.session_id or reply.head.metadata.run_id != message.run_id:
                if conversation.forwarded_session == message.session_id:  # the last answer was lost
                    return calls.PUSH_OBJECT.response(stored=True)
                raise RequestRefused(NOT_YOURS, "an object of no reply")
            try:
                await run_in_threadpool(reply.add, message.object_id, message.object_content)
                if reply.is_complete:
                    await self._hand_on(reply, caller, conversation)
            except OSError as error:
                log.error("a reply can't be kept: %s", error)
                raise RequestRefused(LATER, "the server has no room") from None
        return calls.PUSH_OBJECT.response(stored=True)

    async def _hand_on(self, reply: Reply, caller: Caller, conversation: NodeExchange) -> None:
        """Hand a complete reply on to the SuperLink."""
        reply.attempts += 1
        run = reply.head.metadata.run_id
        asked = _request(
            calls.PUSH_MESSAGES,
            conversation,
            messages_list=[reply.head],
            message_object_trees=[reply.tree],
            clientapp_runtime_list=[reply.runtime],
        )
        try:
            found = await self._ask(calls.PUSH_MESSAGES, asked, caller)
            wanted = set(found.objects_to_push)
            for identifier in [name for name in reply.objects if name in wanted]:
                content = await run_in_threadpool(reply.content, identifier)
                stored = await self._ask(
                    calls.PUSH_OBJECT,
                    _request(
                        calls.PUSH_OBJECT,
                        conversation,
                        run_id=run,
                        object_id=identifier,
                        object_content=content,
                        session_id=found.session_id,
                    ),
                    caller,
                )
                if not stored.stored:
                    status = LATER if reply.attempts < _TRIES else NOT_YOURS
                    raise RequestRefused(status, "the server doesn't take this reply")
        except SuperLinkError:  # e.g. the run is over
            conversation.drop(reply)
            raise
        except RequestRefused:
            if reply.attempts >= _TRIES:
                conversation.drop(reply)
            raise
        if (old := conversation.mark_forwarded(reply)) is not None:
            with contextlib.suppress(SuperLinkError, RequestRefused):
                await self._remove(*old, caller, conversation)

    async def _object(self, run: int, identifier: str, caller: Caller, conversation: NodeExchange) -> Any:
        return await self._ask(
            calls.PULL_OBJECT, _request(calls.PULL_OBJECT, conversation, run_id=run, object_id=identifier), caller
        )

    async def _remove(self, run: int, message: str, caller: Caller, conversation: NodeExchange) -> None:
        """Have the SuperLink remove a message's objects, if they are there."""
        asked = _request(calls.CONFIRM, conversation, run_id=run, message_object_id=message)
        await self._ask(calls.CONFIRM, asked, caller)

    async def _ask(self, call: Call, message: Message, caller: Caller) -> Any:
        answer = await self.superlink.ask(call, message, caller.headers)
        if answer.status >= 500:  # e.g. a locked database
            raise RequestRefused(LATER, "the server is busy")
        if answer.status != 200:
            raise SuperLinkError(answer)
        return call.response.FromString(answer.content)

    def _conversation(self, caller: Caller) -> NodeExchange:
        found = self.conversations.get(caller.key)
        node = caller.node
        if node is None and found is not None:
            node = found.node
        if node is None:
            raise RequestRefused(UNKNOWN if self.registering else LATER, "this node hasn't come yet")
        if found is None or found.node != node:
            found = self._begin(caller.key, node)
        self.conversations.move_to_end(caller.key)
        return found

    def _begin(self, key: str, node: int) -> NodeExchange:
        """Return the conversation with a node, or begin a new one if the node has a new id."""
        found = self.conversations.get(key)
        if found is None or found.node != node:
            if found is not None:
                found.close()
            found = self.conversations[key] = NodeExchange(node)
        while len(self.conversations) > _CONVERSATIONS:
            _, oldest = self.conversations.popitem(last=False)
            oldest.close()
        return found

    def _make_room(self) -> None:
        """If the spool is full, drop stalled replies. Refusal if that isn't enough."""
        replies = [(found, found.reply) for found in self.conversations.values() if found.reply is not None]
        total = sum(reply.size for _, reply in replies)
        if total <= self.spool_bytes:
            return
        for conversation, reply in replies:
            if time.monotonic() - reply.last_arrival > _STALLED:
                total -= reply.size
                conversation.drop(reply)
        if total > self.spool_bytes:
            raise RequestRefused(LATER, "the server is busy")


def _request(call: Call, conversation: NodeExchange, **fields: Any) -> Message:
    """Make a request on behalf of the conversation's node."""
    found: Any = call.request(**fields)
    found.node.node_id = conversation.node
    return found
