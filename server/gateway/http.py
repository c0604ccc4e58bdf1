"""Read requests' bodies, and build the gateway's responses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from common import strict_json
from server.gateway import calls
from server.gateway.refusal import MALFORMED, TOO_LARGE, RequestRefused, hostile
from server.gateway.superlink_client import PROTOBUF

_PIECE = 64 << 10  # bytes of an answer written at once: the maximum that a slow connection buffers


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a request's body.

    Raises:
        RequestRefused: the body has more than `max_bytes` bytes, or the connection broke.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise hostile(f"a request of more than {max_bytes} bytes", TOO_LARGE)
    except ClientDisconnect:
        raise RequestRefused(MALFORMED, "cut off") from None
    return bytes(body)


def in_pieces(content: bytes) -> Response:
    """Respond with a message of Flower's protocol, written in pieces."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]

    return StreamingResponse(pieces(), media_type=PROTOBUF, headers={"content-length": str(len(content))})


def refusal_response(refusal: RequestRefused, request: Request) -> Response:
    """Answer a request whose body may be unread: a long body is cut off."""
    length = request.headers.get("content-length", "0")
    short = "transfer-encoding" not in request.headers and length.isdecimal() and int(length[:12]) <= calls.HEAD
    return PlainTextResponse(refusal.reason, refusal.status, headers={} if short else {"connection": "close"})


def json_response(value: Any) -> Response:
    """Respond with a value as JSON."""
    return Response(strict_json.dumps(value), media_type="application/json")
