"""The gateway at a real port with TLS: half-open and slow connections, and certificate reload."""

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
def directory(tmp_path):
    return ServerDir(tmp_path)


@pytest.fixture
def port(directory):
    port = free_port()
    directory.prepare([LOOPBACK], port)
    server = serve(gateway(directory), host=LOOPBACK, port=port, certificates=directory.certificates)
    yield port
    server.should_exit = True


def gateway(directory):
    return Gateway(
        superlink_url="http://inside",
        registry=DeviceRegistry(directory.folder),
        hello=hello,
        authority=b"an authority",
        register_node=lambda *_: None,
        folder=directory.folder,
        limits=LIMITS,
    )


def connect(port, source=LOOPBACK, *, tls=True):
    sock = socket.create_connection((LOOPBACK, port), timeout=10, source_address=(source, 0))
    if not tls:
        return sock
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(sock)


def responds(port, source="127.0.0.9"):
    """Return whether the gateway answers another machine."""
    transport = httpx.HTTPTransport(verify=False, local_address=source)
    with httpx.Client(base_url=f"https://{LOOPBACK}:{port}", transport=transport, timeout=10) as client:
        return client.get("/v1/anther/hello").status_code == 200


def count_closed(sockets):
    """Count the sockets that the server has closed."""
    count = 0
    for sock in sockets:
        sock.settimeout(0.01)
        with contextlib.suppress(TimeoutError, ssl.SSLWantReadError):
            try:
                count += sock.recv(1000) == b""
            except (ConnectionError, ssl.SSLError):
                count += 1
    return count


@pytest.mark.integration
@pytest.mark.parametrize("tls", [True, False])
def test_half_open_heads_do_not_block_others(port, tls):
    connections = []
    for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        for _ in range(10):
            with contextlib.suppress(OSError):
                sock = connect(port, source, tls=tls)
                sock.sendall(b"GET /v1/anther/hello HTTP/1.1\r\nhost: a\r\nx: ")
                connections.append(sock)
    assert connections
    time.sleep(0.6)
    assert responds(port), "the oldest was evicted"
    assert responds(port, "127.0.0.4"), "also for others behind the same address"
    wait_until(lambda: count_closed(connections) == len(connections), 20, "all closed")
    for sock in connections:
        sock.close()
    assert responds(port, "127.0.0.2")


def test_slow_head_is_closed(port):
    with connect(port) as sock:
        sock.sendall(b"GET /v1/anther/hello HTTP/1.1\r\nhost: a\r\n")
        began = time.monotonic()
        with pytest.raises((ConnectionError, ssl.SSLError, TimeoutError)):  # noqa: PT012
            while time.monotonic() - began < 15:
                sock.sendall(b"x")
                time.sleep(0.2)
            raise AssertionError("still open")


def test_stalled_body_is_closed(port):
    with connect(port) as sock:
        sock.sendall(b"POST /v1/anther/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 9000\r\n\r\n{")
        sock.settimeout(15)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert sock.recv(1000) == b""


def test_slow_body_is_accepted(port):
    body = b'{"protocol": 1}'.ljust(15)
    with connect(port) as sock:
        sock.sendall(b"POST /v1/anther/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 15\r\n\r\n")
        for number in range(len(body)):  # longer than the limits for a head or an idle connection
            time.sleep(0.3)
            sock.sendall(body[number : number + 1])
        assert sock.recv(1000).startswith(b"HTTP/1.1 403")


def test_slow_reader_gets_whole_answer(directory):
    size, port, key = 3 << 20, free_port(), new_key()
    directory.prepare([LOOPBACK], port)
    served = gateway(directory)
    served.registry.enroll(served.registry.issue("ada"), openssh(key), "pi")
    served.base_routes = [Route("/big", lambda _: Response(bytes(size)))]
    server = serve(served, host=LOOPBACK, port=port, certificates=directory.certificates)
    try:
        with connect(port) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            head = "".join(f"{name}: {value}\r\n" for name, value in signed(key, "/big").items())
            sock.sendall(f"GET /big HTTP/1.1\r\nhost: a\r\n{head}\r\n".encode())
            came = 0
            while came < size:
                came += len(sock.recv(1 << 18))
                time.sleep(0.03)
            assert came >= size
    finally:
        server.should_exit = True


def test_many_requests_per_connection(port):
    with httpx.Client(base_url=f"https://{LOOPBACK}:{port}", verify=False) as client:
        for _ in range(20):
            assert client.get("/v1/anther/hello").status_code == 200


def test_websocket_upgrade_is_ignored(port):
    with connect(port) as sock:
        sock.sendall(
            b"GET /v1/anther/in HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        assert sock.recv(1000).startswith(b"HTTP/1.1 401")


def test_head_size_limit(port):
    with connect(port) as sock:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert sock.recv(1000).partition(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 400 ", b"")
    assert responds(port)


def presented_certificate(port):
    """Return the certificate that clients get, in PEM."""
    return ssl.get_server_certificate((LOOPBACK, port), timeout=10).encode()


def test_certificate_reload_without_restart(directory):
    port = free_port()
    directory.prepare([LOOPBACK], port)
    server = serve(gateway(directory), host=LOOPBACK, port=port, certificates=directory.certificates)
    try:
        assert presented_certificate(port) == directory.certificates.certificate.read_bytes()
        directory.rotate()
        reload_certificate(server, directory.certificates)
        assert presented_certificate(port) == directory.certificates.certificate.read_bytes()
    finally:
        server.should_exit = True


def test_port_in_use(port, directory):
    with pytest.raises(
        AntherError, match=r"can't listen on this address .Address already in use.: choose another server.port"
    ):
        serve(gateway(directory), host=LOOPBACK, port=port, certificates=directory.certificates)
