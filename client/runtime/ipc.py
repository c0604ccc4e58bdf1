"""What ClientApp and worker say to each other over a socket of this machine: a line of JSON, and an adapter's bytes.

The socket lies in a folder that is its owner's alone, and whoever connects is asked for its user: a worker serves
nobody else.
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
_LENGTHS = struct.Struct("!IQ")  # of the JSON, and of what follows it
_PEER = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED

REQUESTS = {kind.__name__: kind for kind in (messages.Query, messages.Train, messages.Evaluate, messages.Personalize)}
REPLIES = {
    kind.__name__: kind for kind in (messages.DeviceReport, messages.Update, messages.Evaluation, messages.Personalized)
}


class WorkerResponse(NamedTuple):
    """What came of it: a reply, or why there is none."""

    reply: Reply | None = None
    refused: str | None = None
    """That the server may be told. None without a reply: it failed, and why is in the worker's log alone."""


def same_user(connection: socket.socket) -> bool:
    """Whether whoever connected runs as we do; where the system doesn't tell, the folder's permissions must do."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(found)[1]) == os.getuid()


def ask(connection: socket.socket, request: Request) -> WorkerResponse:
    """Send a request and wait for what comes of it; ConnectionError if whoever answers is gone."""
    text, adapter = _parts(request)
    _send(connection, {"kind": type(request).__name__, "message": text}, adapter)
    head, data = _receive(connection)
    if "message" not in head:
        return WorkerResponse(refused=head.get("refused"))
    return WorkerResponse(reply=_message(REPLIES, head, data))  # type: ignore[arg-type]


def recv_request(connection: socket.socket) -> Request:
    """The request of whoever connected.

    Raises:
        ConnectionError: it is gone.
        AntherError: what it says is malformed.
    """
    head, data = _receive(connection)
    return _message(REQUESTS, head, data)  # type: ignore[return-value,arg-type]


def tell(connection: socket.socket, answered: WorkerResponse) -> None:
    if answered.reply is None:
        _send(connection, {"refused": answered.refused}, None)
        return
    text, adapter = _parts(answered.reply)
    _send(connection, {"kind": type(answered.reply).__name__, "message": text}, adapter)


def _parts(message: Request | Reply) -> tuple[str, bytes | None]:
    return messages.to_json(message), messages.payloads(message).get("adapter")


def _message(kinds: dict[str, type], head: dict[str, str], data: bytes | None) -> Request | Reply:
    kind = kinds.get(head.get("kind", ""))
    if kind is None:
        raise AntherError(f"{head.get('kind')!r}: nothing that is asked or answered here")
    # An evaluation or a report carries no adapter, whatever came: `from_json` names a field too many.
    found: Request | Reply = messages.from_json(kind, head["message"], **({} if data is None else {"adapter": data}))
    return found


def _send(connection: socket.socket, head: Mapping[str, str | None], data: bytes | None) -> None:
    text = json.dumps({**head, "carries": data is not None}).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(data or b"")) + text)
    if data:
        connection.sendall(data)


def _receive(connection: socket.socket) -> tuple[dict[str, str], bytes | None]:
    letters, bytes_after = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    if letters > 2 * messages.MAX_JSON_CHARS + 65536 or bytes_after > LARGEST:
        raise AntherError(f"a message of {letters} + {bytes_after} bytes is too long")
    head = json.loads(_exactly(connection, letters))
    data = _exactly(connection, bytes_after)
    return head, data if head.pop("carries") else None


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    view, there = memoryview(found), 0
    while there < size:
        came = connection.recv_into(view[there:])
        if not came:
            raise ConnectionResetError(f"the line was cut after {there} of {size} bytes")
        there += came
    return bytes(found)
