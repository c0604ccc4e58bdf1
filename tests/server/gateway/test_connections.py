"""How many connections there may be, and how long each may take, by a clock of the test's."""

import pytest

from conf.schemas.server import LimitsConfig
from server.gateway.connections import ConnectionPhase, ConnectionTable, network

LIMITS = LimitsConfig(
    connections_per_address=3, total_connections=8, header_seconds=20, idle_seconds=60, min_kib_per_second=4
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def connections(clock):
    return ConnectionTable(LIMITS, clock, total=8)


@pytest.fixture
def ended():
    return []


@pytest.fixture
def come(connections, ended):
    def come(host, port):
        return connections.admit((host, port), lambda: ended.append((host, port)))

    return come


def test_one_address_has_so_many_that_nobody_has_shown_on(connections, clock, come, ended):
    assert [come("192.0.2.1", port) for port in range(4)] == [True] * 3 + [False], "all have only just come"
    assert come("192.0.2.2", 1)
    clock.now += 1
    connections.mark_authenticated(("192.0.2.1", 0), "key")
    assert come("192.0.2.1", 4)
    assert ended == []
    assert come("192.0.2.1", 5)
    assert ended == [("192.0.2.1", 1)], "the oldest stranger of that address makes room, and no device does"
    for port in (4, 4, 5):
        connections.release(("192.0.2.1", port))
    assert come("192.0.2.1", 10)
    assert len(ended) == 1


def test_of_ipv6_one_sender_has_a_64(connections, come):
    assert [come(f"2001:db8::{n}", n) for n in range(4)] == [True] * 3 + [False]
    assert come("2001:db8:0:1::1", 1)
    connections.mark_authenticated(("2001:db8::0", 0), "key")
    connections.release(("2001:db8::0", 0, 0, 0))
    assert connections.get(("2001:db8::1", 1, 0, 0)).key is None
    assert len(connections) == 3
    assert network(("::ffff:192.0.2.1", 5)) == "192.0.2.1"
    assert network("") == ""


def test_when_all_are_taken_the_oldest_stranger_makes_room(connections, clock, come, ended):
    hosts = ["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6"]
    assert all(come(host, port) for port, host in enumerate(hosts))
    connections.mark_authenticated(("192.0.2.1", 0), "key")
    clock.now += 1
    assert come("192.0.2.7", 100)
    assert ended == [("192.0.2.1", 1)], "of the network that holds most; a device's own stays"
    assert len(connections) == 8
    clock.now += 1
    for address in [*connections._open]:
        connections.mark_authenticated(address, f"key of {address}")
    assert not come("192.0.2.8", 100), "devices that have shown who they are aren't sent away for a stranger"


def test_of_one_device_the_oldest_of_too_many_is_closed(ended):
    many = ConnectionTable(LimitsConfig(), total=100)
    for port in range(33):
        many.admit(("192.0.2.1", port), lambda port=port: ended.append(port))
        many.mark_authenticated(("192.0.2.1", port), "key")
    assert ended == [0]


def test_a_head_has_to_come_in_time_however_it_drips(connections, clock, come, ended):
    come("192.0.2.1", 1)
    connection = connections.get(("192.0.2.1", 1))
    for _ in range(20):
        clock.now += 1
        connection.moved = clock.now
        connections.sweep()
    assert ended == []
    clock.now += 1
    connections.sweep()
    assert ended == [("192.0.2.1", 1)]


def drip(connections, clock, connection, rate, seconds):
    for _ in range(seconds):
        clock.now += 1
        connection.bytes += rate
        connection.moved = clock.now if rate else connection.moved
        connections.sweep()


def test_a_body_may_be_slow_but_not_endless(connections, clock, come, ended):
    for port, rate in ((1, 30_000), (2, 5000), (3, 100)):
        come("192.0.2.1", port)
        connection = connections.get(("192.0.2.1", port))
        connection.enter(ConnectionPhase.BODY, clock.now)
        drip(connections, clock, connection, rate, 600)
        connections.release(("192.0.2.1", port))
    assert set(ended) == {("192.0.2.1", 3)}


def test_a_body_that_stops_coming(connections, clock, come, ended):
    come("192.0.2.1", 1)
    connection = connections.get(("192.0.2.1", 1))
    connection.enter(ConnectionPhase.BODY, clock.now)
    connection.bytes = 10 << 20
    clock.now += 59
    connections.sweep()
    assert ended == []
    clock.now += 2
    connections.sweep()
    assert ended == [("192.0.2.1", 1)]


def test_an_answer_over_a_slow_line_is_waited_for_and_one_that_nobody_reads_is_not(connections, clock, come, ended):
    come("192.0.2.1", 1)
    connection = connections.get(("192.0.2.1", 1))
    connection.enter(ConnectionPhase.ANSWER, clock.now)
    left = [5 << 20]
    connection.unsent = lambda: left[0]
    for _ in range(150):
        clock.now += 1
        left[0] -= 30_000
        connections.sweep()
    connection.enter(ConnectionPhase.HEAD, clock.now)
    for _ in range(30):  # the last of it, after it was written
        clock.now += 1
        left[0] = max(left[0] - 1000, 1)
        connections.sweep()
    assert ended == []
    clock.now += 61
    connections.sweep()
    assert ended == [("192.0.2.1", 1)]


def test_the_server_may_take_its_time(connections, clock, come, ended):
    come("192.0.2.1", 1)
    connections.get(("192.0.2.1", 1)).enter(ConnectionPhase.ANSWER, clock.now)
    clock.now += 1000
    connections.sweep()
    assert ended == []
