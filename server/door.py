"""The one port that a federation has: enrolment, the base, and of Flower's SuperLink what devices need of it.

    GET  /v1/anther/ca       the authority's certificate, which a ticket names the fingerprint of
    GET  /v1/anther/hello    versions of the protocol, the base, the clock: what a device asks before anything else
    POST /v1/anther/enrol    a ticket and a public key: the device is in
    GET  /v1/anther/in       whether who asks is in
    /v1/anther/base/…        the base in pieces, for who is in (`server.shelf`)
    POST /v1/fleet/…         Flower's own, for who is in

Nothing else of the SuperLink is reached from outside. Who was revoked is shut out here, from the next request on.
While the SuperLink is away devices are told so and wait.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from conf.errors import AntherError
from protocol import messages, plain
from protocol.hello import Enrolment, Hello
from server import identity
from server.register import Register
from server.superlink import Certificates

log = logging.getLogger(__name__)

_LARGEST = 64 << 20  # bytes of one request: Flower cuts what is larger
_ENROLMENT = 16 << 10
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "date", "server"}
_PASSED = ("content-type", "accept")


@dataclass
class Door:
    """What stands between devices and the SuperLink.

    Args:
        inside: base URL of the SuperLink.
        authority: of the federation, in PEM; empty without TLS: then whoever reaches the port is in.
        welcome: called with the public key and the name of a device that has just come in, and returns once the
            SuperLink knows it.
        shelf: routes of the base, for who is in.
    """

    inside: str
    register: Register
    hello: Callable[[], Hello]
    authority: bytes
    welcome: Callable[[str, str], None]
    shelf: Sequence[BaseRoute] = ()
    verify: ssl.SSLContext | bool = True
    _client: httpx.AsyncClient | None = field(default=None, init=False)

    def app(self) -> Starlette:
        inside = Starlette(routes=[Route("/v1/anther/in", self._is_in), *self.shelf])
        return Starlette(
            routes=[
                Route("/v1/anther/ca", self._ca),
                Route("/v1/anther/hello", self._greet),
                Route("/v1/anther/enrol", self._enrol, methods=["POST"]),
                Route("/v1/fleet/{call}", self._fleet, methods=["POST"]),
                Mount("", app=_Kept(inside, self._allows)),
            ]
        )

    async def _ca(self, request: Request) -> Response:
        del request
        return PlainTextResponse(self.authority.decode())

    async def _greet(self, request: Request) -> Response:
        del request
        return _json(self.hello())

    async def _is_in(self, request: Request) -> Response:
        del request
        return PlainTextResponse("in")

    async def _enrol(self, request: Request) -> Response:
        try:
            body = await _body(request, _ENROLMENT)
            asked = plain.from_plain(Enrolment, plain.loads(body))
            check_version(asked.protocol)
            key = identity.canonical(asked.key)
            if not (0 < len(asked.name) <= 64 and asked.name.isprintable()):
                raise AntherError("a device's name has 1 to 64 printable characters: choose another with name=…")
            member = await run_in_threadpool(self.register.enrol, asked.secret, key, asked.name)
            await run_in_threadpool(self.welcome, key, member.name)
        except (AntherError, ValueError) as error:
            return JSONResponse({"error": str(error)}, status_code=403)
        log.info("%s is in, of %s", member.name, member.holder)
        return _json(self.hello())

    def _allows(self, headers: Any, path: str) -> bool:
        key = identity.proven(headers, path)
        return not self.authority or (key is not None and self.register.look().known(key) is not None)

    async def _fleet(self, request: Request) -> Response:
        """Hand a call on; the SuperLink checks the signature itself."""
        if self.authority:
            key = identity.claimed(request.headers)
            if key is None or self.register.look().known(key) is None:
                return PlainTextResponse("not enrolled here, or revoked", status_code=401)
        try:
            body = await _body(request, _LARGEST)
        except AntherError as error:
            return PlainTextResponse(str(error), status_code=413)
        headers = {n: v for n, v in request.headers.items() if n in _PASSED or n.startswith("flwr-")}
        if self._client is None:
            self._client = httpx.AsyncClient(base_url=self.inside, verify=self.verify, timeout=60.0, trust_env=False)
        try:
            found = await self._client.post(request.url.path, content=body, headers=headers)
        except httpx.TransportError:
            return PlainTextResponse("the federation is starting again", status_code=503)
        kept = {name: value for name, value in found.headers.items() if name.lower() not in _HOP}
        return Response(found.content, status_code=found.status_code, headers=kept)


@dataclass
class _Kept:
    """An application for who is in."""

    app: Starlette
    allows: Callable[[Any, str], bool]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope)
        if scope["type"] == "http" and not self.allows(request.headers, request.url.path):
            await PlainTextResponse("not enrolled here, or revoked", status_code=401)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def check_version(theirs: int) -> None:
    """AntherError, for whoever has to update, if a device and this server don't speak alike."""
    if theirs < messages.OLDEST:
        raise AntherError(
            f"this server speaks protocol {messages.OLDEST} and later, and the device {theirs}: update Anther on the "
            "device (pip install --upgrade anther)"
        )


def serve(door: Door, *, host: str, port: int, certificates: Certificates | None) -> uvicorn.Server:
    """Open the door in a thread of its own; AntherError if the port is taken."""
    config = uvicorn.Config(
        door.app(), host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5,
        ssl_certfile=certificates and str(certificates.certificate), ssl_keyfile=certificates and str(certificates.key),
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined] # ours are
    thread = threading.Thread(target=server.run, name="door", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    if not server.started:
        raise AntherError(f"{host}:{port}: nobody can listen there: choose another server.port, or stop what does")
    return server


def show(server: uvicorn.Server, certificates: Certificates) -> None:
    """Whoever connects from now on is shown this certificate."""
    assert isinstance(server.config.ssl, ssl.SSLContext)
    server.config.ssl.load_cert_chain(certificates.certificate, certificates.key)


async def _body(request: Request, most: int) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise AntherError(f"a request of more than {most} bytes")
    return bytes(found)


def _json(value: Any) -> Response:
    return Response(plain.dumps(value), media_type="application/json")


def now() -> str:
    """For `Hello.time`: a device whose clock is off would be refused without knowing why."""
    return datetime.now(UTC).isoformat()
