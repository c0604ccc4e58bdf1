"""Read a base from a server by HTTP, with the certificates and signatures of the given client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from client.runtime.downloads import GetBytes
from common.errors import AntherError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 60.0  # seconds without a byte
MIN_RATE = 1024.0  # bytes per second, after the first minute: a slower server could block a device forever


def http_get(client: httpx.Client) -> GetBytes:
    """Return a function that reads bytes of a path on the server.

    It raises ConnectionError if the connection breaks or the server is overloaded, so that a retry may help, and
    AntherError for permanent errors.

    Args:
        client: with the server's `base_url`, `verify` and authentication.
    """
    import httpx

    def get(path: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}  # no decompression: received bytes are counted
        if length is not None:
            headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        try:
            with client.stream("GET", path, headers=headers, follow_redirects=False, timeout=TIMEOUT) as reply:
                _check(reply, offset, ranged=length is not None)
                began, received = time.monotonic(), 0
                for piece in reply.iter_raw():
                    received += len(piece)
                    if time.monotonic() - began > TIMEOUT + received / MIN_RATE:
                        raise ConnectionError(f"slower than {MIN_RATE:.0f} bytes a second")
                    yield piece
        except httpx.TransportError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error

    return get


def _check(reply: httpx.Response, offset: int, *, ranged: bool) -> None:
    status, server = reply.status_code, reply.url.netloc.decode()
    if status >= 500 or status in (408, 425, 429):
        raise ConnectionError(f"{server} answers {status}")
    if status in (401, 403):
        raise AntherError(
            f"{server} refuses to send its base to this device ({status}): ask its operator to enroll the device"
        )
    if status in (404, 410):
        raise AntherError(f"{server} doesn't have this base ({status})")
    began = reply.headers.get("content-range", "").startswith(f"bytes {offset}-")
    if not (status == 206 and began if ranged else status == 200):
        raise AntherError(f"{server} answers {status} to a range request: check that it is an Anther server")
