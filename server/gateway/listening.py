"""Serve the gateway at its port: uvicorn's HTTP, with additional limits on connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import AntherError
from server.gateway.app import Gateway
from server.gateway.connections import Connection, ConnectionPhase, ConnectionTable, Listener
from server.gateway.pki import Certificates

_HEAD = 16 << 10  # bytes of a request's head
_BACKLOG = 512
_KEEP_ALIVE = 15  # seconds that a connection stays open for the next request


class WatchedProtocol(H11Protocol):
    """HTTP/1.1 protocol that records the event that its connection waits for."""

    admitted: ConnectionTable
    watched: Connection | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watched = self.admitted.get(transport.get_extra_info("peername"))
        if self.watched is None:  # it was closed in the meantime
            transport.abort()
        else:
            self.watched.unsent = transport.get_write_buffer_size
            self.watched.end = transport.abort

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.watched is not None:
            self._update_phase()
            self.watched.last_progress = self.admitted.clock()
            self.watched.bytes += len(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_phase(again=True)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # the answer is still being sent over a slow connection
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            super().timeout_keep_alive_handler()

    def _update_phase(self, *, again: bool = False) -> None:
        if self.watched is None:
            return
        if self.conn.their_state is h11.SEND_BODY:
            phase = ConnectionPhase.BODY
        elif self.cycle is not None and not self.cycle.response_complete:
            phase = ConnectionPhase.ANSWER
        else:
            phase = ConnectionPhase.HEAD
        now = self.admitted.clock()
        if again and phase is ConnectionPhase.HEAD:
            self.watched.since = now
        self.watched.enter(phase, now)


class _Server(uvicorn.Server):
    """A server that runs in a thread and closes slow connections."""

    connections: ConnectionTable

    def install_signal_handlers(self) -> None:
        """Install no signal handlers: the process has its own."""

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            self.connections.sweep()
        return await super().on_tick(counter)


def serve(gateway: Gateway, *, host: str, port: int, certificates: Certificates | None) -> uvicorn.Server:
    """Start the gateway in a separate thread.

    Args:
        gateway: application.
        host: address to listen on.
        port: port to listen on.
        certificates: None: without TLS.

    Raises:
        AntherError: the address is not available.
    """
    connections = ConnectionTable(gateway.limits)
    gateway.on_authenticated = connections.mark_authenticated
    protocol = type("Protocol", (WatchedProtocol,), {"admitted": connections})
    listener = _listener(host, port, connections)
    config = uvicorn.Config(
        gateway.app(),
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        h11_max_incomplete_event_size=_HEAD,
        ssl_certfile=certificates and str(certificates.certificate),
        ssl_keyfile=certificates and str(certificates.key),
    )
    server = _Server(config)
    server.connections = connections
    thread = threading.Thread(target=server.run, args=([listener],), name="gateway", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    if not server.started:
        raise AntherError(f"{host}:{port}: the gateway did not start: see the lines above")
    return server


def reload_certificate(server: uvicorn.Server, certificates: Certificates) -> None:
    """Use the certificate in these files from the next connection on."""
    assert isinstance(server.config.ssl, ssl.SSLContext)
    server.config.ssl.load_cert_chain(certificates.certificate, certificates.key)


def _listener(host: str, port: int, connections: ConnectionTable) -> Listener:
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = Listener(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise AntherError(
            f"{host}:{port}: can't listen on this address ({error.strerror or error}): choose another server.port "
            "or server.host, or stop the program that uses it"
        ) from None
    listener.connections = connections
    return listener
