"""Limits on open connections: their number by address, and the time that each may take."""

from __future__ import annotations

import contextlib
import ipaddress
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schemas.server import LimitsConfig

_GRACE = 60.0  # seconds before a request's speed is checked
_PER_KEY = 32  # connections of one device
_MIN_AGE = 0.5  # seconds before a new connection may be evicted


class ConnectionPhase(Enum):
    """The event that a connection waits for."""

    HEAD = "a TLS handshake, or the head of a request"
    BODY = "a request's body"
    ANSWER = "the gateway's answer, or its reader"


@dataclass
class Connection:
    """State of one open connection.

    Args:
        end: closes it at once.
    """

    address: Any
    opened: float
    since: float
    """Start of the phase."""
    end: Callable[[], None]
    phase: ConnectionPhase = ConnectionPhase.HEAD
    last_progress: float = 0.0
    """Time of the last byte received or sent."""
    bytes: int = 0
    """Bytes received of the current request."""
    unsent: Callable[[], int] = lambda: 0
    last_unsent: int = 0
    """Unsent bytes at the last check."""
    key: str | None = None
    """Enrolled key that has authenticated on the connection."""

    @property
    def network(self) -> str:
        return network(self.address)

    def enter(self, phase: ConnectionPhase, now: float) -> None:
        """Start the phase of another event."""
        if phase is not self.phase:
            self.phase, self.since, self.last_progress, self.bytes = phase, now, now, 0


def network(address: Any) -> str:
    """Return the network of one sender: an IPv4 address, or a /64 of IPv6."""
    host = str(address[0]) if isinstance(address, tuple) else str(address)
    try:
        parsed = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if parsed.version == 4:
        return host
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def _key(address: Any) -> Any:
    """Return host and port: for IPv6, the system reports more fields than uvicorn does."""
    return tuple(address[:2]) if isinstance(address, tuple | list) else address


@dataclass
class ConnectionTable:
    """All open connections of a listener; used in its event loop only.

    Args:
        settings: the limits.
        clock: returns monotonic seconds.
    """

    settings: LimitsConfig
    clock: Callable[[], float] = time.monotonic
    total: int = 0
    """Maximum number of connections; 0: derived from the settings and the limit on open files."""
    _open: dict[Any, Connection] = field(default_factory=dict)
    _unauthenticated: Counter[str] = field(default_factory=Counter)  # unauthenticated connections by network

    def __post_init__(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = self.settings.total_connections if files < 0 else files * 3 // 4
        self.total = self.total or max(1, min(self.settings.total_connections, allowed))

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, address: Any, end: Callable[[], None]) -> bool:
        """Admit a connection, evicting the oldest unauthenticated one if there are too many; False: close it.

        A device authenticates within a fraction of a second, so an unauthenticated connection makes room, also for
        devices behind the same address.
        """
        source, now, key = network(address), self.clock(), _key(address)
        if key in self._open:
            return False
        if self._unauthenticated[source] >= self.settings.connections_per_address and not self._evict(source, now):
            return False
        if len(self._open) >= self.total and not self._evict(self._busiest_network(), now):
            return False
        self._open[key] = Connection(address, now, now, end, last_progress=now)
        self._unauthenticated[source] += 1
        return True

    def get(self, address: Any) -> Connection | None:
        """Return the open connection of this address."""
        return self._open.get(_key(address))

    def mark_authenticated(self, address: Any, key: str) -> None:
        """Record the enrolled key that has authenticated on a connection; if it has too many, close its oldest."""
        connection = self._open.get(_key(address))
        if connection is None or connection.key == key:
            return
        if connection.key is None:
            self._uncount(connection)
        connection.key = key
        same = [other for other in self._open.values() if other.key == key]
        if len(same) > _PER_KEY:
            same[0].end()

    def release(self, address: Any) -> None:
        """Remove a connection that has been closed."""
        connection = self._open.pop(_key(address), None)
        if connection is not None and connection.key is None:
            self._uncount(connection)

    def sweep(self) -> None:
        """Close connections that are too slow."""
        now = self.clock()
        for connection in [*self._open.values()]:
            if self._is_late(connection, now):
                connection.end()

    def _is_late(self, connection: Connection, now: float) -> bool:
        unsent = connection.unsent()
        if unsent != connection.last_unsent:
            connection.last_unsent, connection.last_progress = unsent, now
        quiet = now - connection.last_progress > self.settings.idle_seconds
        if unsent:
            if connection.phase is ConnectionPhase.HEAD:
                connection.since = now  # the wait for the next head starts when this answer has been sent
            return quiet
        waited = now - connection.since
        if connection.phase is ConnectionPhase.HEAD:
            return waited > self.settings.header_seconds
        if connection.phase is ConnectionPhase.BODY:
            slow = waited > _GRACE and connection.bytes < (waited - _GRACE) * self.settings.min_kib_per_second * 1024
            return quiet or slow
        return False

    def _busiest_network(self) -> str:
        """Return the network with the most unauthenticated connections."""
        return next((source for source, _ in self._unauthenticated.most_common(1)), "")

    def _evict(self, source: str, now: float) -> bool:
        """Close a network's oldest unauthenticated connection; False if all of them are too new to be closed."""
        for connection in self._open.values():  # in order of arrival
            if connection.key is None and connection.network == source:
                if now - connection.opened < _MIN_AGE:
                    return False
                connection.end()
                self.release(connection.address)
                return True
        return False

    def _uncount(self, connection: Connection) -> None:
        self._unauthenticated[connection.network] -= 1
        if self._unauthenticated[connection.network] <= 0:
            del self._unauthenticated[connection.network]


class Accepted(socket.socket):
    """A connection that reports when it is closed."""

    released: Callable[[], None] = staticmethod(lambda: None)

    def close(self) -> None:
        self.released()
        super().close()


class Listener(socket.socket):
    """A listening socket that returns only connections which `connections` admits."""

    connections: ConnectionTable

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept one connection.

        Raises:
            ConnectionAbortedError: the connection wasn't admitted, and is closed. asyncio treats this as a client that
                disconnected.
        """
        connection, address = super().accept()
        accepted = Accepted(fileno=connection.detach())

        def end() -> None:
            with contextlib.suppress(OSError):
                accepted.shutdown(socket.SHUT_RDWR)

        if not self.connections.admit(address, end):
            accepted.close()
            raise ConnectionAbortedError("too many connections")
        accepted.released = lambda: self.connections.release(address)
        return accepted, address
