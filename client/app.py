"""The ClientApp: what a node runs for each message.

It only connects things. On a real device, where ANTHER_WORKER names the socket of a worker that holds the base, it
hands the request on and needs no torch; in a simulation it answers by itself. Nothing that a server sends chooses the
device's files, policy or noise: those come from the node's own configuration and environment. The configuration of the
server's run isn't read here: what a device needs of it is in the messages.
"""

from __future__ import annotations

import logging
import os
import socket
import time

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client.runtime import ipc
from common.errors import AntherError
from privacy.policy import RequestRefusedError
from protocol import records
from protocol.messages import Reply, Request

log = logging.getLogger(__name__)

app = ClientApp()

WORKER = "ANTHER_WORKER"
FAILED = "failed, see the device's own log"
"""The one word for everything that goes wrong: which of them it was can depend on the owner's pictures."""
TRIES, PAUSE = 4, 1.0  # a worker that dies is there again when it is next connected to


@app.query()
@app.train()
@app.train("personalise")
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Reply to any request; whatever goes wrong becomes this node's error reply."""
    try:
        request = parse_request(message)
    except RequestRefusedError as error:
        return reply_message(error, message)
    if WORKER in os.environ:
        return relayed(request, os.environ[WORKER], message)
    return reply_message(_by_ourselves(request, context), message)


def parse_request(message: Message, *, most: int | None = None) -> Request:
    """What a message asks for; Refusal if it can't be read, since what is wrong with it is the server's to know.

    Args:
        most: bytes of an adapter that are looked at; None: whatever was sent.
    """
    try:
        return records.request_from_records(message.metadata.message_type, message.content, most=most)
    except AntherError as error:
        raise RequestRefusedError(str(error)) from None


def relayed(request: Request, path: str, message: Message) -> Message:
    """The reply of the worker, which may have to be started, and is asked again if it dies.

    What it had charged before it died stays charged: asked the same, it goes on under the same reservation.
    """
    for left in reversed(range(TRIES)):
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                answered = ipc.ask(connection, request)
        except (OSError, AntherError) as error:
            log.warning("the worker did not answer (%s), %d tries left", error, left)
            time.sleep(PAUSE if left else 0)
            continue
        if answered.reply is not None:
            return Message(records.reply_to_records(answered.reply), reply_to=message)
        if answered.refused is not None:
            return _error(message, f"{records.REFUSED}{answered.refused}")
        break
    return _error(message, FAILED)


def reply_message(outcome: Reply | Exception, request: Message) -> Message:
    """The reply, or an error that tells the server only what a refusal may tell it.

    Other exceptions can name the owner's files, so their text stays in the device's own log.
    """
    if not isinstance(outcome, Exception):
        try:
            return Message(records.reply_to_records(outcome), reply_to=request)
        except ValueError as error:  # a loss that isn't finite, say: JSON has none, and no other reply is harmed by it
            outcome = error
    unforeseen = None if isinstance(outcome, AntherError) else outcome
    log.error("could not answer %s: %s", request.metadata.message_type, outcome, exc_info=unforeseen)
    if isinstance(outcome, RequestRefusedError):
        return _error(request, f"{records.REFUSED}{outcome}")
    return _error(request, FAILED)


def _by_ourselves(request: Request, context: Context) -> Reply | Exception:
    from client.runtime import request_handler

    return request_handler.answer(request, _stated(context))


def _error(request: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=request)


def _stated(context: Context) -> dict[str, object]:
    """The node's configuration; a simulated node has none of its own, so the environment can fill it in."""
    node: dict[str, object] = dict(context.node_config)
    for key, variable in (("data-root", "ANTHER_DATA_ROOT"), ("base", "ANTHER_BASE"), ("test", "ANTHER_TEST")):
        if variable in os.environ:
            node.setdefault(key, os.environ[variable])
    return node
