"""The gateway's client of the SuperLink: each call uses a path of the table and a message made by the gateway."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
from google.protobuf.message import Message

from server.gateway.calls import Call
from server.gateway.refusal import LATER, RequestRefused

PROTOBUF = "application/protobuf"
_TIMEOUT = 60.0  # seconds
_AT_ONCE = 32  # concurrent requests; a SuperLink serves 40


class Answer(NamedTuple):
    """The SuperLink's answer."""

    status: int
    content: bytes
    kind: str
    """Content type of the answer."""


class SuperLinkError(Exception):
    """A refusal by the SuperLink, passed on to the device."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass
class SuperLinkClient:
    """Client of the SuperLink on behalf of nodes.

    Args:
        address: base URL.
        verify: TLS verification of the SuperLink.
    """

    address: str
    verify: ssl.SSLContext | bool = True
    transport: httpx.AsyncBaseTransport | None = None
    _client: httpx.AsyncClient | None = field(default=None, init=False)
    _slots: asyncio.Semaphore | None = field(default=None, init=False)

    async def ask(self, call: Call, message: Message, headers: Mapping[str, str]) -> Answer:
        """Make one call.

        Args:
            call: the call.
            message: its request.
            headers: signature headers of the node.

        Raises:
            RequestRefused: the SuperLink is unavailable.
        """
        if self._client is None or self._slots is None:  # created here, in the gateway's event loop
            self._client = httpx.AsyncClient(
                base_url=self.address,
                verify=self.verify,
                timeout=_TIMEOUT,
                trust_env=False,
                transport=self.transport,
                follow_redirects=False,
            )
            self._slots = asyncio.Semaphore(_AT_ONCE)
        protobuf = {"content-type": PROTOBUF, "accept": PROTOBUF}
        try:
            async with self._slots:
                response = await self._client.post(
                    call.path, content=message.SerializeToString(), headers={**headers, **protobuf}
                )
        except httpx.TransportError:
            raise RequestRefused(LATER, "the federation is starting again") from None
        return Answer(response.status_code, response.content, response.headers.get("content-type", PROTOBUF))
