"""Server side of Flower's fleet protocol: each call is checked, and issued as a new call to the SuperLink."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import Reconnect
from google.protobuf.message import Message
from starlette.concurrency import run_in_threadpool

from server.gateway import calls
from server.gateway.calls import Call
from server.gateway.exchange import DeliveredMessage, NodeExchange
from server.gateway.identity import Caller
from server.gateway.refusal import LATER, NOT_YOURS, UNKNOWN, RequestRefused, hostile
from server.gateway.replies import Reply, ReplyLimits
from server.gateway.superlink_client import SuperLinkClient, SuperLinkError

log = logging.getLogger(__name__)

_EXCHANGES = 4096
_STALLED = 600.0  # seconds without an object
_TRIES = 10  # attempts to forward a reply that the SuperLink doesn't store


@dataclass
class FleetService:
    """Implementation of the fleet protocol's calls, with the exchanges of all nodes.

    Args:
        superlink: client of the SuperLink.
        limits: returns the limits on a reply of the run.
        folder: spool folder for incoming replies.
        registering: whether nodes register themselves (without TLS and keys).
        spool_bytes: maximum bytes of all incoming replies together.
    """

    superlink: SuperLinkClient
    limits: Callable[[], ReplyLimits]
    folder: Path
    registering: bool = False
    spool_bytes: int = 4 << 30
    exchanges: OrderedDict[str, NodeExchange] = field(default_factory=OrderedDict)

    async def execute_call(self, call: Call, message: Any, caller: Caller) -> Message:
        """Execute one call and return its response.

        Args:
            call: the call.
            message: its request.
            caller: the authenticated sender.

        Raises:
            RequestRefused: the gateway refuses the call.
            SuperLinkError: the SuperLink refuses the call.
        """
        if call in (calls.REGISTER, calls.ACTIVATE):
            return await self._activate(call, message, caller)
        exchange = self._exchange(caller)
        if call in (calls.DEACTIVATE, calls.UNREGISTER):
            return await self._deactivate(call, message, caller, exchange)
        if message.node.node_id != exchange.node:
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
        return await handlers[call](message, caller, exchange)

    async def _activate(self, call: Call, message: Any, caller: Caller) -> Message:
        if message.public_key != caller.pem:
            raise hostile("another node's key", UNKNOWN)
        if call is calls.REGISTER:
            if not self.registering:
                raise hostile("nodes of this federation are enrolled, and don't register")
            response = await self._ask(call, calls.REGISTER.request(public_key=caller.pem), caller)
        else:
            if caller.node is None and not self.registering:
                raise RequestRefused(LATER, "the federation is starting")
            request = call.request(public_key=caller.pem, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            response = await self._ask(call, request, caller)
        self._begin(caller.key, response.node_id)
        return response

    async def _deactivate(self, call: Call, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        if message.node_id != exchange.node:
            raise hostile("another node's id", UNKNOWN)
        if call is calls.UNREGISTER and not self.registering:
            raise hostile("nodes of this federation are enrolled, and don't register")
        return await self._ask(call, call.request(node_id=exchange.node), caller)

    async def _heartbeat(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        del message
        return await self._ask(
            calls.HEARTBEAT,
            exchange.request(calls.HEARTBEAT, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL),
            caller,
        )

    async def _pull_messages(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        del message
        async with exchange.lock:
            response = await self._ask(calls.PULL_MESSAGES, exchange.request(calls.PULL_MESSAGES), caller)
            earlier = [name for name, delivered in exchange.delivered.items() if not delivered.confirmed]
            for head, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                exchange.record_delivery(head, tree)
            if response.messages_list:  # the node has finished the previous message; its objects would never be removed
                for name in earlier:
                    with contextlib.suppress(SuperLinkError, RequestRefused):
                        await self._confirm_for(name, exchange.delivered.get(name), caller, exchange)
        return response

    async def _get_run(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        exchange.check_run(message.run_id, "run")
        return await self._ask(calls.GET_RUN, exchange.request(calls.GET_RUN, run_id=message.run_id), caller)

    async def _get_fab(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        exchange.check_run(message.run_id, "app")
        if len(message.hash_str) > 64:
            raise hostile("an invalid hash")
        request = exchange.request(calls.GET_FAB, run_id=message.run_id, hash_str=message.hash_str)
        return await self._ask(calls.GET_FAB, request, caller)

    async def _pull_object(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        delivered = exchange.find_object(message.object_id, message.run_id)
        response = await self._object(message.run_id, message.object_id, caller, exchange)
        if response.object_available:
            delivered.pulls[message.object_id] += 1
            delivered.sent.add(message.object_id)
        return response

    async def _confirm(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        delivered = exchange.find_message(message.message_object_id, message.run_id)
        async with exchange.lock:
            if not await self._confirm_for(message.message_object_id, delivered, caller, exchange):
                raise hostile("receipt of a message that hasn't been sent completely", LATER)
        return calls.CONFIRM.response()

    async def _confirm_for(
        self, name: str, delivered: DeliveredMessage | None, caller: Caller, exchange: NodeExchange
    ) -> bool:
        """Confirm a message's receipt, so that the SuperLink removes it; False if the server is still sending it.

        A SuperNode doesn't pull objects that it already has, so the gateway checks these itself.
        """
        if delivered is None or delivered.confirmed:
            return True
        for identifier in delivered.objects - delivered.sent:
            response = await self._object(delivered.head.run_id, identifier, caller, exchange)
            if response.object_found and not response.object_available:
                return False
            delivered.sent.add(identifier)
        await self._remove(delivered.head.run_id, name, caller, exchange)
        delivered.confirmed = True
        return True

    async def _push_messages(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        del caller
        async with exchange.lock:
            if exchange.reply is None:
                self._free_spool()
            reply = exchange.begin(message, self.limits(), self.folder)
            head = message.messages_list[0]
            response = calls.PUSH_MESSAGES.response(reconnect=Reconnect(reconnect=5))
            response.results[head.metadata.message_id] = 0
            if reply is None:
                return response
            response.session_id = reply.session
            # All objects, even those that the SuperLink has: devices must not learn which it has.
            response.objects_to_push.extend(reply.objects)
            return response

    async def _push_object(self, message: Any, caller: Caller, exchange: NodeExchange) -> Message:
        async with exchange.lock:
            reply = exchange.reply
            if reply is None or reply.session != message.session_id or reply.head.metadata.run_id != message.run_id:
                if exchange.forwarded_session == message.session_id:  # the last answer was lost
                    return calls.PUSH_OBJECT.response(stored=True)
                raise RequestRefused(NOT_YOURS, "an object of no reply")
            try:
                await run_in_threadpool(reply.add, message.object_id, message.object_content)
                if reply.is_complete:
                    await self._forward(reply, caller, exchange)
            except OSError as error:
                log.error("a reply can't be spooled: %s", error)
                raise RequestRefused(LATER, "the server can't store the reply") from None
        return calls.PUSH_OBJECT.response(stored=True)

    async def _forward(self, reply: Reply, caller: Caller, exchange: NodeExchange) -> None:
        """Forward a complete reply to the SuperLink."""
        reply.attempts += 1
        run = reply.head.metadata.run_id
        request = exchange.request(
            calls.PUSH_MESSAGES,
            messages_list=[reply.head],
            message_object_trees=[reply.tree],
            clientapp_runtime_list=[reply.runtime],
        )
        try:
            response = await self._ask(calls.PUSH_MESSAGES, request, caller)
            missing = set(response.objects_to_push)
            for identifier in [name for name in reply.objects if name in missing]:
                content = await run_in_threadpool(reply.content, identifier)
                stored = await self._ask(
                    calls.PUSH_OBJECT,
                    exchange.request(
                        calls.PUSH_OBJECT,
                        run_id=run,
                        object_id=identifier,
                        object_content=content,
                        session_id=response.session_id,
                    ),
                    caller,
                )
                if not stored.stored:
                    status = LATER if reply.attempts < _TRIES else NOT_YOURS
                    raise RequestRefused(status, "the server doesn't accept this reply")
        except SuperLinkError:  # e.g. the run is over
            exchange.drop(reply)
            raise
        except RequestRefused:
            if reply.attempts >= _TRIES:
                exchange.drop(reply)
            raise
        if (old := exchange.mark_forwarded(reply)) is not None:
            with contextlib.suppress(SuperLinkError, RequestRefused):
                await self._remove(*old, caller, exchange)

    async def _object(self, run: int, identifier: str, caller: Caller, exchange: NodeExchange) -> Any:
        return await self._ask(
            calls.PULL_OBJECT, exchange.request(calls.PULL_OBJECT, run_id=run, object_id=identifier), caller
        )

    async def _remove(self, run: int, message: str, caller: Caller, exchange: NodeExchange) -> None:
        """Make the SuperLink remove a message's objects, if it has them."""
        request = exchange.request(calls.CONFIRM, run_id=run, message_object_id=message)
        await self._ask(calls.CONFIRM, request, caller)

    async def _ask(self, call: Call, message: Message, caller: Caller) -> Any:
        answer = await self.superlink.ask(call, message, caller.headers)
        if answer.status >= 500:  # e.g. a locked database
            raise RequestRefused(LATER, "the server is busy")
        if answer.status != 200:
            raise SuperLinkError(answer)
        return call.response.FromString(answer.content)

    def _exchange(self, caller: Caller) -> NodeExchange:
        exchange = self.exchanges.get(caller.key)
        node = caller.node
        if node is None and exchange is not None:
            node = exchange.node
        if node is None:
            raise RequestRefused(UNKNOWN if self.registering else LATER, "this node hasn't registered yet")
        if exchange is None or exchange.node != node:
            exchange = self._begin(caller.key, node)
        self.exchanges.move_to_end(caller.key)
        return exchange

    def _begin(self, key: str, node: int) -> NodeExchange:
        """Return the exchange with a node, or begin a new one if the node has a new id."""
        exchange = self.exchanges.get(key)
        if exchange is None or exchange.node != node:
            if exchange is not None:
                exchange.close()
            exchange = self.exchanges[key] = NodeExchange(node)
        while len(self.exchanges) > _EXCHANGES:
            _, oldest = self.exchanges.popitem(last=False)
            oldest.close()
        return exchange

    def _free_spool(self) -> None:
        """If the spool is full, drop stalled replies.

        Raises:
            RequestRefused: the spool is still full.
        """
        replies = [(exchange, exchange.reply) for exchange in self.exchanges.values() if exchange.reply is not None]
        total = sum(reply.size for _, reply in replies)
        if total <= self.spool_bytes:
            return
        for exchange, reply in replies:
            if time.monotonic() - reply.last_arrival > _STALLED:
                total -= reply.size
                exchange.drop(reply)
        if total > self.spool_bytes:
            raise RequestRefused(LATER, "the server is busy")
