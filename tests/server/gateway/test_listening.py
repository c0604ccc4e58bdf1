"""The gateway at a real port, over TLS: half-open connections, slow ones, and a certificate that changes."""

import contextlib
import socket
import ssl
import time

import httpx
import pytest
from starlette.responses import Response
from starlette.routing import Route

from bench.reliability.processes import LOOPBACK, free_port, wait_until
from common.errors import AntherError
from conf.schemas.server import LimitsConfig
from server.gateway.app import Gateway
from server.gateway.device_registry import DeviceRegistry
from server.gateway.listening import reload_certificate, serve
from server.supervisor.server_dir import ServerDir
from tests.helpers.served import hello, new_key, openssh, signed

LIMITS = LimitsConfig(connections_per_address=8, total_connections=12, header_seconds=1.5, idle_seconds=1.5)


@pytest.fixture
def place(tmp_path):
    return ServerDir(tmp_path)


@pytest.fixture
def port(place):
    port = free_port()
    place.prepare([LOOPBACK], port)
    opened = serve(gateway(place), host=LOOPBACK, port=port, certificates=place.certificates)
    yield port
    opened.should_exit = True


def gateway(place):
    return Gateway(
        superlink_url="http://inside",
        registry=DeviceRegistry(place.folder),
        hello=hello,
        authority=b"an authority",
        register_node=lambda *_: None,
        folder=place.folder,
        limits=LIMITS,
    )


def line(port, source=LOOPBACK, *, tls=True):
    found = socket.create_connection((LOOPBACK, port), timeout=10, source_address=(source, 0))
    if not tls:
        return found
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(found)


def greeted(port, source="127.0.0.9"):
    """Whether another machine is greeted now."""
    transport = httpx.HTTPTransport(verify=False, local_address=source)
    with httpx.Client(base_url=f"https://{LOOPBACK}:{port}", transport=transport, timeout=10) as client:
        return client.get("/v1/anther/hello").status_code == 200


def closed(sockets):
    """How many the server has closed by now."""
    count = 0
    for found in sockets:
        found.settimeout(0.01)
        with contextlib.suppress(TimeoutError, ssl.SSLWantReadError):
            try:
                count += found.recv(1000) == b""
            except (ConnectionError, ssl.SSLError):
                count += 1
    return count


@pytest.mark.parametrize("tls", [True, False])
def test_half_open_heads_shut_nobody_out(port, tls):
    held = []
    for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        for _ in range(10):
            with contextlib.suppress(OSError):
                found = line(port, source, tls=tls)
                found.sendall(b"GET /v1/anther/hello HTTP/1.1\r\nhost: a\r\nx: ")
                held.append(found)
    assert held
    time.sleep(0.6)
    assert greeted(port), "in place of the oldest of them"
    assert greeted(port, "127.0.0.4"), "also for others behind the same address"
    wait_until(lambda: closed(held) == len(held), 20, "all of them closed")
    for found in held:
        found.close()
    assert greeted(port, "127.0.0.2")


def test_a_head_that_drips_is_cut_off(port):
    with line(port) as found:
        found.sendall(b"GET /v1/anther/hello HTTP/1.1\r\nhost: a\r\n")
        began = time.monotonic()
        with pytest.raises((ConnectionError, ssl.SSLError, TimeoutError)):  # noqa: PT012
            while time.monotonic() - began < 15:
                found.sendall(b"x")
                time.sleep(0.2)
            raise AssertionError("still open")


def test_a_body_that_stops_is_cut_off(port):
    with line(port) as found:
        found.sendall(b"POST /v1/anther/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 9000\r\n\r\n{")
        found.settimeout(15)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert found.recv(1000) == b""


def test_a_body_over_a_slow_line_comes_in(port):
    body = b'{"protocol": 1}'.ljust(15)
    with line(port) as found:
        found.sendall(b"POST /v1/anther/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 15\r\n\r\n")
        for number in range(len(body)):  # longer than a head or a pause may take
            time.sleep(0.3)
            found.sendall(body[number : number + 1])
        assert found.recv(1000).startswith(b"HTTP/1.1 403")


def test_an_answer_over_a_slow_line_is_sent_to_its_end(place):
    size, port, key = 3 << 20, free_port(), new_key()
    place.prepare([LOOPBACK], port)
    served = gateway(place)
    served.registry.enroll(served.registry.issue("ada"), openssh(key), "pi")
    served.base_routes = [Route("/big", lambda _: Response(bytes(size)))]
    opened = serve(served, host=LOOPBACK, port=port, certificates=place.certificates)
    try:
        with line(port) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            head = "".join(f"{name}: {value}\r\n" for name, value in signed(key, "/big").items())
            found.sendall(f"GET /big HTTP/1.1\r\nhost: a\r\n{head}\r\n".encode())
            came = 0
            while came < size:
                came += len(found.recv(1 << 18))
                time.sleep(0.03)
            assert came >= size
    finally:
        opened.should_exit = True


def test_many_requests_on_one_connection(port):
    with httpx.Client(base_url=f"https://{LOOPBACK}:{port}", verify=False) as client:
        for _ in range(20):
            assert client.get("/v1/anther/hello").status_code == 200


def test_a_websocket_is_a_request_like_any_other(port):
    with line(port) as found:
        found.sendall(
            b"GET /v1/anther/in HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        assert found.recv(1000).startswith(b"HTTP/1.1 401")


def test_a_head_is_at_most_so_long(port):
    with line(port) as found:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            found.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert found.recv(1000).partition(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 400 ", b"")
    assert greeted(port)


def shown(port):
    """The certificate that a client is shown now, as PEM."""
    return ssl.get_server_certificate((LOOPBACK, port), timeout=10).encode()


def test_a_new_certificate_is_shown_without_a_restart(place):
    port = free_port()
    place.prepare([LOOPBACK], port)
    opened = serve(gateway(place), host=LOOPBACK, port=port, certificates=place.certificates)
    try:
        assert shown(port) == place.certificates.certificate.read_bytes()
        place.rotate()
        reload_certificate(opened, place.certificates)
        assert shown(port) == place.certificates.certificate.read_bytes()
    finally:
        opened.should_exit = True


def test_a_port_that_is_taken(port, place):
    with pytest.raises(AntherError, match=r"can't listen there .Address already in use.: choose another server.port"):
        serve(gateway(place), host=LOOPBACK, port=port, certificates=place.certificates)
