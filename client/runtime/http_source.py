"""How `client.runtime.downloads` asks a server for bytes: by HTTP, with the links and the proofs of who is who that it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from client.runtime.downloads import GetBytes
from common.errors import AntherError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 60.0  # seconds without a byte
SLOWEST = 1024.0  # bytes a second, after the first minute: who sends less could keep a device waiting for ever


def http_get(client: httpx.Client) -> GetBytes:
    """Bytes of a path of a server.

    Args:
        client: with the server's `base_url`, `verify`, and whatever headers say who asks.

    The function raises ConnectionError for a link that was cut or a server that can't answer now, which may be tried
    again, and AntherError for an answer that will stay the same.
    """
    import httpx

    def get(path: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        asked = {"Accept-Encoding": "identity"}  # what comes is counted as it comes
        if length is not None:
            asked["Range"] = f"bytes={offset}-{offset + length - 1}"
        try:
            with client.stream("GET", path, headers=asked, follow_redirects=False, timeout=TIMEOUT) as reply:
                _check(reply, offset, ranged=length is not None)
                began, came = time.monotonic(), 0
                for piece in reply.iter_raw():
                    came += len(piece)
                    if time.monotonic() - began > TIMEOUT + came / SLOWEST:
                        raise ConnectionError(f"slower than {SLOWEST:.0f} bytes a second")
                    yield piece
        except httpx.TransportError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error

    return get


def _check(reply: httpx.Response, offset: int, *, ranged: bool) -> None:
    status, server = reply.status_code, reply.url.netloc.decode()
    if status >= 500 or status in (408, 425, 429):
        raise ConnectionError(f"{server} answers {status}")
    if status in (401, 403):
        raise AntherError(f"{server} doesn't hand its base to this device ({status}): ask its operator to enrol it")
    if status in (404, 410):
        raise AntherError(f"{server} has not got it ({status})")
    began = reply.headers.get("content-range", "").startswith(f"bytes {offset}-")
    if not (status == 206 and began if ranged else status == 200):
        raise AntherError(f"{server} answers {status} where a part was asked for: is it an Anther server?")
