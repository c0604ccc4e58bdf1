"""Messages between ClientApp and worker, over a local socket: one line of JSON, then an adapter's bytes.

The socket lies in a folder that only its owner can access, and the worker checks the user of each connection and
answers no other user.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import NamedTuple

from common.errors import AntherError
from protocol import messages
from protocol.messages import Reply, Request

LARGEST = 1 << 30  # bytes of an adapter
_LENGTHS = struct.Struct("!IQ")  # lengths of the JSON, and of the bytes after it
_PEER = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED

REQUESTS = {kind.__name__: kind for kind in (messages.Query, messages.Train, messages.Evaluate, messages.Personalize)}
REPLIES = {
    kind.__name__: kind for kind in (messages.DeviceReport, messages.Update, messages.Evaluation, messages.Personalized)
}


class WorkerResponse(NamedTuple):
    """Outcome of a request: a reply, or the reason for a refusal."""

    reply: Reply | None = None
    refused: str | None = None
    """Reason that may be sent to the server. If it and `reply` are None, the request failed, and the reason is only in
    the worker's log.
    """


def same_user(connection: socket.socket) -> bool:
    """Return whether the peer runs as this user; if the system can't tell, the folder's permissions must suffice."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(credentials)[1]) == os.getuid()


def request_response(connection: socket.socket, request: Request) -> WorkerResponse:
    """Send a request and wait for its outcome; ConnectionError if the worker has disconnected."""
    text, adapter = _parts(request)
    _send(connection, {"kind": type(request).__name__, "message": text}, adapter)
    head, data = _receive(connection)
    if "message" not in head:
        return WorkerResponse(refused=head.get("refused"))
    return WorkerResponse(reply=_message(REPLIES, head, data))  # type: ignore[arg-type]


def recv_request(connection: socket.socket) -> Request:
    """Receive a request.

    Raises:
        ConnectionError: the peer has disconnected.
        AntherError: the message is malformed.
    """
    head, data = _receive(connection)
    return _message(REQUESTS, head, data)  # type: ignore[return-value,arg-type]


def send_response(connection: socket.socket, response: WorkerResponse) -> None:
    """Send the outcome of a request."""
    if response.reply is None:
        _send(connection, {"refused": response.refused}, None)
        return
    text, adapter = _parts(response.reply)
    _send(connection, {"kind": type(response.reply).__name__, "message": text}, adapter)


def _parts(message: Request | Reply) -> tuple[str, bytes | None]:
    return messages.to_json(message), messages.payloads(message).get("adapter")


def _message(kinds: dict[str, type], head: dict[str, str], data: bytes | None) -> Request | Reply:
    kind = kinds.get(head.get("kind", ""))
    if kind is None:
        raise AntherError(f"{head.get('kind')!r}: unknown kind of message")
    # An evaluation or a report has no adapter: if one was received, `from_json` reports the extra field.
    message: Request | Reply = messages.from_json(kind, head["message"], **({} if data is None else {"adapter": data}))
    return message


def _send(connection: socket.socket, head: Mapping[str, str | None], data: bytes | None) -> None:
    text = json.dumps({**head, "carries": data is not None}).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(data or b"")) + text)
    if data:
        connection.sendall(data)


def _receive(connection: socket.socket) -> tuple[dict[str, str], bytes | None]:
    json_bytes, data_bytes = _LENGTHS.unpack(_receive_bytes(connection, _LENGTHS.size))
    if json_bytes > 2 * messages.MAX_JSON_CHARS + 65536 or data_bytes > LARGEST:
        raise AntherError(f"a message of {json_bytes} + {data_bytes} bytes is too long")
    head = json.loads(_receive_bytes(connection, json_bytes))
    data = _receive_bytes(connection, data_bytes)
    return head, data if head.pop("carries") else None


def _receive_bytes(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view, count = memoryview(buffer), 0
    while count < size:
        received = connection.recv_into(view[count:])
        if not received:
            raise ConnectionResetError(f"the connection was cut after {count} of {size} bytes")
        count += received
    return bytes(buffer)
