"""Limits on the number and duration of connections, with a fake clock."""

import pytest

from conf.schemas.server import LimitsConfig
from server.gateway.connections import ConnectionPhase, ConnectionTable, network

LIMITS = LimitsConfig(
    connections_per_address=3, total_connections=8, header_seconds=20, idle_seconds=60, min_kib_per_second=4
)


class _Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return _Clock()


@pytest.fixture
def connections(clock):
    return ConnectionTable(LIMITS, clock, total=8)


@pytest.fixture
def closed():
    return []


@pytest.fixture
def connect(connections, closed):
    def connect(host, port):
        return connections.admit((host, port), lambda: closed.append((host, port)))

    return connect


def test_limit_of_unauthenticated_connections_per_address(connections, clock, connect, closed):
    assert [connect("192.0.2.1", port) for port in range(4)] == [True] * 3 + [False], "all are too new to evict"
    assert connect("192.0.2.2", 1)
    clock.now += 1
    connections.mark_authenticated(("192.0.2.1", 0), "key")
    assert connect("192.0.2.1", 4)
    assert closed == []
    assert connect("192.0.2.1", 5)
    assert closed == [("192.0.2.1", 1)], "evicts the oldest unauthenticated connection of that address"
    for port in (4, 4, 5):
        connections.release(("192.0.2.1", port))
    assert connect("192.0.2.1", 10)
    assert len(closed) == 1


def test_ipv6_limit_is_per_64_prefix(connections, connect):
    assert [connect(f"2001:db8::{n}", n) for n in range(4)] == [True] * 3 + [False]
    assert connect("2001:db8:0:1::1", 1)
    connections.mark_authenticated(("2001:db8::0", 0), "key")
    connections.release(("2001:db8::0", 0, 0, 0))
    assert connections.get(("2001:db8::1", 1, 0, 0)).key is None
    assert len(connections) == 3
    assert network(("::ffff:192.0.2.1", 5)) == "192.0.2.1"
    assert network("") == ""


def test_total_limit_evicts_oldest_unauthenticated(connections, clock, connect, closed):
    hosts = ["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6"]
    assert all(connect(host, port) for port, host in enumerate(hosts))
    connections.mark_authenticated(("192.0.2.1", 0), "key")
    clock.now += 1
    assert connect("192.0.2.7", 100)
    assert closed == [("192.0.2.1", 1)], "of the network with the most; authenticated connections stay"
    assert len(connections) == 8
    clock.now += 1
    for address in [*connections._open]:
        connections.mark_authenticated(address, f"key of {address}")
    assert not connect("192.0.2.8", 100), "authenticated connections are not evicted"


def test_limit_of_connections_per_device(closed):
    many = ConnectionTable(LimitsConfig(), total=100)
    for port in range(33):
        many.admit(("192.0.2.1", port), lambda port=port: closed.append(port))
        many.mark_authenticated(("192.0.2.1", port), "key")
    assert closed == [0]


def test_slow_head_times_out(connections, clock, connect, closed):
    connect("192.0.2.1", 1)
    connection = connections.get(("192.0.2.1", 1))
    for _ in range(20):
        clock.now += 1
        connection.last_progress = clock.now
        connections.sweep()
    assert closed == []
    clock.now += 1
    connections.sweep()
    assert closed == [("192.0.2.1", 1)]


def drip(connections, clock, connection, rate, seconds):
    for _ in range(seconds):
        clock.now += 1
        connection.bytes += rate
        connection.last_progress = clock.now if rate else connection.last_progress
        connections.sweep()


def test_body_has_minimum_rate(connections, clock, connect, closed):
    for port, rate in ((1, 30_000), (2, 5000), (3, 100)):
        connect("192.0.2.1", port)
        connection = connections.get(("192.0.2.1", port))
        connection.enter(ConnectionPhase.BODY, clock.now)
        drip(connections, clock, connection, rate, 600)
        connections.release(("192.0.2.1", port))
    assert set(closed) == {("192.0.2.1", 3)}


def test_stalled_body_times_out(connections, clock, connect, closed):
    connect("192.0.2.1", 1)
    connection = connections.get(("192.0.2.1", 1))
    connection.enter(ConnectionPhase.BODY, clock.now)
    connection.bytes = 10 << 20
    clock.now += 59
    connections.sweep()
    assert closed == []
    clock.now += 2
    connections.sweep()
    assert closed == [("192.0.2.1", 1)]


def test_slow_reader_is_kept_and_stalled_reader_closed(connections, clock, connect, closed):
    connect("192.0.2.1", 1)
    connection = connections.get(("192.0.2.1", 1))
    connection.enter(ConnectionPhase.ANSWER, clock.now)
    left = [5 << 20]
    connection.unsent = lambda: left[0]
    for _ in range(150):
        clock.now += 1
        left[0] -= 30_000
        connections.sweep()
    connection.enter(ConnectionPhase.HEAD, clock.now)
    for _ in range(30):  # the rest, after it was written
        clock.now += 1
        left[0] = max(left[0] - 1000, 1)
        connections.sweep()
    assert closed == []
    clock.now += 61
    connections.sweep()
    assert closed == [("192.0.2.1", 1)]


def test_slow_server_is_no_timeout(connections, clock, connect, closed):
    connect("192.0.2.1", 1)
    connections.get(("192.0.2.1", 1)).enter(ConnectionPhase.ANSWER, clock.now)
    clock.now += 1000
    connections.sweep()
    assert closed == []
