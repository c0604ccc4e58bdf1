"""How a device comes in, and whom it believes: against a real gateway on loopback, with TLS."""

from datetime import UTC, datetime, timedelta

import pytest

from bench.processes import free_port
from client import enroll
from client.link import Link, Refused, Unreachable, enrol, skew
from conf.errors import AntherError
from conf.node import compose
from protocol import messages
from protocol.hello import Hello
from protocol.ticket import Ticket
from server.gateway.app import Gateway
from server.gateway.listening import serve
from server.keys import ticket
from server.place import Place
from server.register import Register

BASE = "b" * 64


class Server:
    """A gateway with nothing behind it."""

    def __init__(self, folder, port):
        self.place, self.port = Place(folder), port
        self.place.prepare(["127.0.0.1"], port)
        self.register = Register(folder)
        self.newest, self.off = messages.NEWEST, timedelta(0)
        gateway = Gateway(
            inside="https://127.0.0.1:1", register=self.register, hello=self.hello,
            authority=self.place.certificates.authority.read_bytes(), welcome=lambda *_: None,
        )  # fmt: skip
        self.uvicorn = serve(gateway, host="127.0.0.1", port=port, certificates=self.place.certificates)

    def hello(self):
        return Hello(
            oldest=self.newest, newest=self.newest, anther="1", federation=self.place.fingerprint()[:16], base=BASE,
            base_bytes=5, time=(datetime.now(UTC) + self.off).isoformat(),
        )  # fmt: skip

    def ticket(self):
        return ticket(self.place, self.register, "ada", 7.0)

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


def test_a_ticket_is_all_that_is_needed(server, home, capsys):
    assert enroll.main([server.ticket(), "data=my photos/ü", "guard.battery=0.5", "name=pi"]) == 0
    assert "python -m client.run" in capsys.readouterr().out
    node = compose([], home / "node.conf")
    assert (node.name, node.data, node.guard.battery) == ("pi", "my photos/ü", 0.5)
    assert node.link.address == f"127.0.0.1:{server.port}"
    assert node.federation == server.place.fingerprint()[:16]
    link = Link(node.link.address)
    link.check_in()
    assert link.hello().base == BASE
    assert all(file.stat().st_mode & 0o077 == 0 for file in (link.key, home / "node.conf"))


def test_who_answers_in_its_place_is_not_believed_and_not_told_the_secret(server, tmp_path, home):
    other = Server(tmp_path / "other", free_port())
    try:
        given = server.ticket()
        meant = Ticket(f"127.0.0.1:{other.port}", *given.rsplit("/", 2)[1:])
        with pytest.raises(AntherError, match="another server answers than this ticket is for"):
            enrol(meant, "pi")
        assert not (home / "link" / "node.key").exists()
        assert other.register.look().members == {}
        link, _ = enrol(Ticket(f"127.0.0.1:{server.port}", *given.rsplit("/", 2)[1:]), "pi")
        with pytest.raises(AntherError, match="another server answers than the one"):
            Link(f"127.0.0.1:{other.port}").hello()
        link.check_in()
    finally:
        other.close()


def test_who_was_revoked_is_told(server):
    enroll.main([server.ticket(), "name=pi"])
    server.register.revoke("pi")
    with pytest.raises(AntherError, match="isn't enrolled there, or was revoked"):
        Link(f"127.0.0.1:{server.port}").check_in()
    assert issubclass(Refused, AntherError)


def test_a_lost_reply_costs_no_ticket(server):
    written = server.ticket()
    first = enroll.main([written, "name=pi"]), enroll.main([written, "name=pi"])
    assert first == (0, 0)
    assert len(server.register.look().inside()) == 1


def test_nobody_there_is_waited_for():
    link = Link(f"127.0.0.1:{free_port()}", insecure=True)
    with pytest.raises(Unreachable, match="no answer"):
        link.hello()


def test_an_older_device_is_told_what_to_do(server, capsys):
    server.newest = messages.NEWEST + 1
    assert enroll.main([server.ticket(), "name=pi"]) == 2
    assert "update Anther here" in capsys.readouterr().err
    assert server.register.look().members == {}


def test_a_clock_that_is_off_is_noticed(server):
    link = Link(f"127.0.0.1:{server.port}")
    enroll.main([server.ticket(), "name=pi"])
    assert skew(link.hello()) == 0
    server.off = timedelta(hours=1)
    assert skew(link.hello()) == pytest.approx(-3600, abs=60)


def test_what_is_no_ticket_or_no_key_is_refused(server, capsys):
    assert enroll.main(["anther://half"]) == 2
    assert "not a whole ticket" in capsys.readouterr().err
    assert enroll.main([server.ticket(), "guard.batery=1"]) == 2
    assert "did you mean guard.battery" in capsys.readouterr().err
    assert server.register.look().members == {}


@pytest.mark.parametrize("damage", [b"", b"no pem"])
def test_damaged_keys_are_named(server, damage):
    enroll.main([server.ticket(), "name=pi"])
    link = Link(f"127.0.0.1:{server.port}")
    link.key.write_bytes(damage)
    with pytest.raises(AntherError, match=r"node\.key.*enrol again"):
        link.check_in()
    link.authority.write_bytes(damage)
    with pytest.raises(AntherError, match=r"ca\.pem.*enrol again"):
        link.hello()
