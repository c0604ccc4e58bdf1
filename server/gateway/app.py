"""HTTP application of the gateway, the only way from outside to Flower's SuperLink.

    GET  /v1/anther/ca       the authority's certificate, whose fingerprint a ticket names
    GET  /v1/anther/hello    protocol versions, base, clock: a device's first request
    POST `ENROLL_PATH`       enroll with a ticket and a public key
    GET  /v1/anther/in       whether the caller is enrolled
    /v1/anther/base/…        the base in pieces, for enrolled devices (`server.gateway.base_files`)
    POST /v1/fleet/…         Flower's fleet protocol, for enrolled devices (`server.gateway.fleet`)

The sender is authenticated by a signature before a body is read. A request is never forwarded: the gateway answers it,
and makes requests of its own to the SuperLink. A revoked device is refused from its next request on. While the
SuperLink is unavailable, devices are asked to retry.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import httpx
from google.protobuf.message import DecodeError, Message
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from common import strict_json
from common.errors import AntherError
from conf.schemas.server import LimitsConfig
from protocol import messages
from protocol.handshake import Enrollment, ServerHello
from server.gateway import calls, identity
from server.gateway.calls import Call
from server.gateway.device_registry import DeviceRegistry, EnrolledDevice
from server.gateway.fleet import FleetService
from server.gateway.http import in_pieces, json_response, read_body, refusal_response
from server.gateway.identity import Caller, Claim
from server.gateway.limits import ACTIVATION_COST, PIECE_COST, RequestBudget
from server.gateway.refusal import LATER, MALFORMED, TOO_LARGE, UNKNOWN, RequestRefused, hostile
from server.gateway.replies import ReplyLimits
from server.gateway.superlink_client import PROTOBUF, SuperLinkClient, SuperLinkError

log = logging.getLogger(__name__)

ENROLL_PATH = "/v1/anther/enrol"  # part of the protocol; don't change

_MAX_ENROLLMENT = 16 << 10  # bytes
_ADAPTER = 64 << 20  # bytes of the largest adapter, until a ServerApp sets it
_QUIET = 60.0  # seconds between two lines of the log about one device
_NOT_ENROLLED = "not enrolled here, or revoked"


@dataclass
class Gateway:
    """HTTP application with every endpoint that devices can reach.

    Args:
        superlink_url: base URL of the SuperLink.
        registry: registry of enrolled devices.
        hello: returns the hello message for devices.
        authority: the federation's certificate authority, in PEM; empty without TLS, where any key is accepted.
        register_node: called with the public key and the name of a newly enrolled device; returns once the SuperLink
            knows it.
        node_of: returns the id of the node with this public key; None if the SuperLink doesn't know it yet.
        largest: returns the size in bytes of the run's largest adapter.
        base_routes: routes of the base, for enrolled devices.
        verify: TLS verification of the SuperLink.
        folder: spool folder for incoming replies.
        on_authenticated: called with the address of a connection and the enrolled key that has authenticated on it.
    """

    superlink_url: str
    registry: DeviceRegistry
    hello: Callable[[], ServerHello]
    authority: bytes
    register_node: Callable[[str, str], None]
    node_of: Callable[[str], int | None] = lambda _: None
    largest: Callable[[], int] = lambda: _ADAPTER
    base_routes: Sequence[BaseRoute] = ()
    verify: ssl.SSLContext | bool = True
    folder: Path = field(default_factory=lambda: Path(gettempdir()))
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    on_authenticated: Callable[[Any, str], None] = lambda *_: None
    transport: httpx.AsyncBaseTransport | None = None
    budget: RequestBudget = field(init=False)
    fleet: FleetService = field(init=False)
    _logged: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.budget = RequestBudget(self.limits)
        self.fleet = FleetService(
            SuperLinkClient(self.superlink_url, self.verify, self.transport),
            lambda: ReplyLimits.of(self.largest()),
            self.folder,
            registering=not self.authority,
        )

    def app(self) -> Starlette:
        enrolled_app = Starlette(routes=[Route("/v1/anther/in", self._is_in), *self.base_routes])
        app = Starlette(
            routes=[
                Route("/v1/anther/ca", self._ca),
                Route("/v1/anther/hello", self._hello),
                Route(ENROLL_PATH, self._enroll, methods=["POST"]),
                *(Route(call.path, _Endpoint(self, call), methods=["POST"]) for call in calls.CALLS),
                Mount("", app=_Enrolled(enrolled_app, self)),
            ]
        )
        app.router.redirect_slashes = enrolled_app.router.redirect_slashes = False
        return app

    async def _ca(self, request: Request) -> Response:
        del request
        return PlainTextResponse(self.authority.decode())

    async def _hello(self, request: Request) -> Response:
        del request
        return json_response(self.hello())

    async def _is_in(self, request: Request) -> Response:
        del request
        return PlainTextResponse("in")

    async def _enroll(self, request: Request) -> Response:
        try:
            body = await read_body(request, _MAX_ENROLLMENT)
            request_body = strict_json.from_plain(Enrollment, strict_json.loads(body))
            check_version(request_body.protocol)
            key = identity.canonical(request_body.key)
            if not (0 < len(request_body.name) <= 64 and request_body.name.isprintable()):
                raise AntherError("a device's name has 1 to 64 printable characters: choose another with name=…")
            member = await run_in_threadpool(self.registry.enroll, request_body.secret, key, request_body.name)
            await run_in_threadpool(self.register_node, key, member.name)
        except RequestRefused as refusal:
            return refusal_response(refusal, request)
        except (AntherError, ValueError) as error:
            return JSONResponse({"error": str(error)}, status_code=403)
        log.info("%s is enrolled, of %s", member.name, member.holder)
        return json_response(self.hello())

    def allows(self, request: Request) -> str | None:
        """Return the enrolled key that signed a request's path, or None."""
        if not self.authority:
            return ""
        key = identity.authenticate(request.headers, request.scope["path"])
        return key if key is not None and self.member(key) is not None else None

    def member(self, key: str) -> EnrolledDevice | None:
        """Return the enrolled device with this key."""
        try:
            return self.registry.snapshot().find(key)
        except AntherError as error:
            log.error("%s", error)
            raise RequestRefused(LATER, "the server needs its operator") from None

    async def answer(self, call: Call, request: Request, *, sending: Callable[[Response], Awaitable[None]]) -> None:
        """Execute one call of the fleet protocol, and send its answer.

        A request counts against the device's concurrency limit until the device has read the answer. Otherwise a slow
        reader could make the gateway hold one answer per open connection. Heartbeats are counted separately, since
        they can't wait for a large object.

        Args:
            call: the call.
            request: its HTTP request.
            sending: sends the response.
        """
        key = ""
        try:
            claim = self._claim(request)
            key = claim.name
            self.on_authenticated(request.scope.get("client"), key)
            self.budget.count_request(key, ACTIVATION_COST if call in (calls.ACTIVATE, calls.DEACTIVATE) else 1.0)
            with self.budget.request_slot(key if call is not calls.HEARTBEAT else f"{key} heartbeat"):
                await sending(await self._execute(call, request, claim))
        except RequestRefused as refusal:
            if refusal.hostile:
                self._count_hostile(key, refusal.reason)
            await sending(refusal_response(refusal, request))

    async def _execute(self, call: Call, request: Request, claim: Claim) -> Response:
        message = await self._message(request, call, claim.name)
        try:
            answer = await self.fleet.execute_call(call, message, self._caller(claim))
        except SuperLinkError as error:
            return Response(error.answer.content, error.answer.status, media_type=error.answer.kind)
        return in_pieces(answer.SerializeToString())

    def _claim(self, request: Request) -> Claim:
        """Authenticate the sender of a request.

        Raises:
            RequestRefused: the sender isn't enrolled, or the signature is invalid.
        """
        claim = identity.parse_claim(request.headers)
        if claim is None or (self.authority and self.member(claim.name) is None):
            raise RequestRefused(UNKNOWN, _NOT_ENROLLED)
        if not claim.verify_signature(claim.time):
            raise RequestRefused(UNKNOWN, "the signature or the clock is wrong")
        return claim

    def _caller(self, claim: Claim) -> Caller:
        headers = claim.headers()
        node = self.node_of(claim.name) if self.authority else None
        return Caller(claim.name, identity.pem(claim.key), headers, node)

    async def _message(self, request: Request, call: Call, key: str) -> Message:
        """Read and parse a request's body."""
        kinds = request.headers.getlist("content-type")
        if [kind.partition(";")[0].strip() for kind in kinds] != [PROTOBUF] or "content-encoding" in request.headers:
            raise hostile("a request of another content type", MALFORMED)
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() and len(length) < 12 else call.max_bytes
        if size > call.max_bytes:
            raise hostile(f"a request of more than {call.max_bytes} bytes", TOO_LARGE)
        with self.budget.reserve_memory(key, size):
            body = await read_body(request, call.max_bytes)
        try:
            message = call.request.FromString(body)
        except DecodeError:
            raise hostile("a request that isn't a message of Flower's protocol", MALFORMED) from None
        message.DiscardUnknownFields()
        return message

    def _count_hostile(self, key: str, reason: str) -> None:
        """Count a hostile request against its sender, and log the sender at most once per interval."""
        self.budget.penalize(key)
        now = time.monotonic()
        if now - self._logged.get(key, -_QUIET) < _QUIET:
            return
        if len(self._logged) > 4096:
            self._logged.clear()
        self._logged[key] = now
        member = self.member(key)
        name = f"{member.name} of {member.holder}" if member else "a node"
        log.warning("%s: refused: %s", name, reason)


@dataclass
class _Endpoint:
    """One call of the fleet protocol, as an application."""

    gateway: Gateway
    call: Call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(response: Response) -> None:
            await response(scope, receive, send)

        await self.gateway.answer(self.call, Request(scope, receive), sending=sending)


@dataclass
class _Enrolled:
    """An application for enrolled devices."""

    app: Starlette
    gateway: Gateway

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        try:
            key = self.gateway.allows(request)
            if key is None:
                raise RequestRefused(UNKNOWN, _NOT_ENROLLED)
            if key:
                self.gateway.on_authenticated(scope.get("client"), key)
            self.gateway.budget.count_request(key, PIECE_COST)
            with self.gateway.budget.request_slot(key):
                await self.app(scope, receive, send)
        except RequestRefused as refusal:
            await refusal_response(refusal, request)(scope, receive, send)


def check_version(device_version: int) -> None:
    """Raise AntherError, naming the side that must update, if device and server share no protocol version."""
    if device_version < messages.OLDEST:
        raise AntherError(
            f"this server supports protocol {messages.OLDEST} and later, and the device {device_version}: update "
            "Anther on the device (pip install --upgrade anther)"
        )


def now() -> str:
    """Return the current time for `ServerHello.time`, with which a device detects that its clock is wrong."""
    return datetime.now(UTC).isoformat()
