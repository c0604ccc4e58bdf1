"""Flower ClientApp: the entry point for each message.

On a real device, ANTHER_WORKER names the socket of a worker that has loaded the base; requests are forwarded to it, and
this process doesn't import torch. In a simulation this process answers the requests. A server's message never
determines the device's files, policy or noise: those come from the node's configuration and environment. The
configuration of the server's run isn't read here; messages contain all values that a device needs.
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
"""Reason that is sent for every internal error, because the exact error can depend on the owner's pictures."""
TRIES, PAUSE = 4, 1.0  # a worker that died is restarted by the next connection


@app.query()
@app.train()
@app.train("personalise")
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Answer any request; every failure becomes an error reply of this node."""
    try:
        request = parse_request(message)
    except RequestRefusedError as error:
        return reply_message(error, message)
    if WORKER in os.environ:
        return relay(request, os.environ[WORKER], message)
    return reply_message(_answer_here(request, context), message)


def parse_request(message: Message, *, max_bytes: int | None = None) -> Request:
    """Parse a message; RequestRefusedError if it is malformed: the reason concerns only the server's own message.

    Args:
        message: the Flower message.
        max_bytes: maximum bytes of an adapter to read; None: no limit.
    """
    try:
        return records.request_from_records(message.metadata.message_type, message.content, max_bytes=max_bytes)
    except AntherError as error:
        raise RequestRefusedError(str(error)) from None


def relay(request: Request, path: str, message: Message) -> Message:
    """Forward a request to the worker and return its reply, with retries if the worker dies.

    A round that was charged before the worker died stays charged; the same request continues under the same
    reservation.

    Args:
        request: the parsed request.
        path: the worker's socket.
        message: the Flower message to reply to.
    """
    for remaining in reversed(range(TRIES)):
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                response = ipc.request_response(connection, request)
        except (OSError, AntherError) as error:
            log.warning("the worker did not answer (%s), %d tries left", error, remaining)
            time.sleep(PAUSE if remaining else 0)
            continue
        if response.reply is not None:
            return Message(records.reply_to_records(response.reply), reply_to=message)
        if response.refused is not None:
            return _error(message, f"{records.REFUSED}{response.refused}")
        break
    return _error(message, FAILED)


def reply_message(outcome: Reply | Exception, request: Message) -> Message:
    """Build the reply message; only a refusal is explained to the server.

    Other exceptions can name the owner's files, so their text stays in the device's log.
    """
    if not isinstance(outcome, Exception):
        try:
            return Message(records.reply_to_records(outcome), reply_to=request)
        except ValueError as error:  # e.g. a non-finite loss, which JSON can't encode: only this reply fails
            outcome = error
    unforeseen = None if isinstance(outcome, AntherError) else outcome
    log.error("could not answer %s: %s", request.metadata.message_type, outcome, exc_info=unforeseen)
    if isinstance(outcome, RequestRefusedError):
        return _error(request, f"{records.REFUSED}{outcome}")
    return _error(request, FAILED)


def _answer_here(request: Request, context: Context) -> Reply | Exception:
    from client.runtime import request_handler

    return request_handler.answer(request, _node_config(context))


def _error(request: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=request)


def _node_config(context: Context) -> dict[str, object]:
    """Return the node's configuration; for simulated nodes, which have none, the environment supplies it."""
    node: dict[str, object] = dict(context.node_config)
    for key, variable in (("data-root", "ANTHER_DATA_ROOT"), ("base", "ANTHER_BASE"), ("test", "ANTHER_TEST")):
        if variable in os.environ:
            node.setdefault(key, os.environ[variable])
    return node
