"""Which store a device has: its own, whatever it is called by now, and never a second one in silence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.cli import forget, leave, ledger, paths
from client.cli.paths import device_files, find, own, remember
from client.runtime import supervisor
from client.runtime.server_connection import ServerConnection
from common.errors import AntherError
from conf.schemas.node import NodeConfig
from privacy.ledger.ledger import DeviceLedger
from privacy.policy import Policy
from protocol.handshake import ServerHello
from protocol.messages import NEWEST, OLDEST
from tests.privacy.ledger.test_ledger import FIRST, free, replace

HELLO = ServerHello(
    oldest=OLDEST,
    newest=NEWEST,
    anther="1",
    federation="f",
    base="0" * 64,
    base_bytes=1,
    time="2026-01-01T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def anther(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("platform.node", lambda: "tablet")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def shares(name: str, number: int = 1) -> None:
    """A round of the device that is called so."""
    files = own(name, None)
    DeviceLedger(files).reserve(replace(FIRST, round=number), free)
    remember(files)


def test_a_renamed_device_keeps_its_ledger(anther: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares("pi", 1)
    shares("my-pi", 2)
    shares("pi", 3)
    assert len(DeviceLedger(own("pi-3", None)).entries()) == 3
    assert [path.name for path in (anther / "devices").iterdir()] == ["pi"]
    (anther / "node.conf").write_text("name=another\n")
    assert len(DeviceLedger(find(None, None)).entries()) == 3
    shutil.copytree(anther, anther.with_name("copy"))
    monkeypatch.setenv("ANTHER_HOME", str(anther.with_name("copy")))
    assert own("pi", None).folder == anther.with_name("copy") / "devices" / "pi"  # not the one that it was copied from


def test_a_renamed_device_of_before_is_refused_with_the_mend(anther: Path) -> None:
    """An earlier Anther noted nothing."""
    DeviceLedger(device_files("pi")).reserve(FIRST, free)
    with pytest.raises(AntherError, match=r"say store=\S+/devices/pi; if not, store=\S+/devices/my-pi$") as error:
        own("my-pi", None)
    assert len(DeviceLedger(own("pi", None)).entries()) == 1
    mends = [word.partition("=")[2].rstrip(";") for word in str(error.value).split() if word.startswith("store=")]
    assert len(DeviceLedger(own("my-pi", mends[0])).entries()) == 1  # with its head, under the old name
    assert not DeviceLedger(own("my-pi", mends[1])).entries()
    assert not (anther / "store").exists()


def test_a_fresh_device_beside_simulated_ones_needs_no_word(anther: Path) -> None:
    (anther / "devices" / "empty").mkdir(parents=True)
    assert own("pi", None).folder == anther / "devices" / "pi"


def test_forgetting_after_leaving_finds_the_store(
    anther: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares("ada-laptop")
    (anther / "node.conf").write_text("name=ada-laptop\nlink.address=leaf.example:9092\n")
    (anther / "devices" / "ada-laptop" / "personal.safetensors").write_bytes(b"learnt")
    assert leave.main(["--yes"]) == 0
    assert forget.main(["--yes"]) == 0
    assert "Removed from" in capsys.readouterr().out
    assert not (anther / "devices" / "ada-laptop" / "personal.safetensors").exists()
    assert ledger.main([]) == 0
    assert "shared with run" in capsys.readouterr().out
    assert ledger.main(["--store", str(tmp_path / "lost")]) == 2
    assert "there is no store here" in capsys.readouterr().err
    assert ledger.main(["--name", "lost"]) == 2


def node(data: Path) -> NodeConfig:
    found = NodeConfig(data=str(data), name="pi")
    found.link.address = "127.0.0.1:1"
    return found


def test_mistakes_are_told_before_anything_is_asked(anther: Path, tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="no such folder"):
        supervisor.run(node(tmp_path / "nowhere"))
    (anther / "devices" / "pi").mkdir(parents=True)
    (anther / "devices" / "pi" / "policy.toml").write_text("max_epsilom = 4\n")
    with pytest.raises(AntherError, match="max_epsilom"):
        supervisor.run(node(tmp_path))


def test_looking_at_pictures_ends_with_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client.cli.check", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}")
    assert done.stderr.count("\n") == 1


def test_a_base_that_the_owner_doesnt_allow_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerConnection, "hello", lambda _: HELLO)
    monkeypatch.setattr(supervisor.links, "skew", lambda _: 0.0)
    monkeypatch.setattr(supervisor, "have", lambda *_: pytest.fail("asked for it"))
    with pytest.raises(AntherError, match="not among `bases`"):
        supervisor.ready(NodeConfig(), ServerConnection("127.0.0.1:1", insecure=True), Policy(bases=("a" * 64,)))


def test_no_greeting_names_a_hub_or_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerConnection, "hello", lambda _: replace_base("attacker/evil-model"))
    monkeypatch.setattr(supervisor, "have", lambda *_: pytest.fail("asked for it"))
    with pytest.raises(AntherError, match="64 hex digits"):
        supervisor.ready(NodeConfig(), ServerConnection("127.0.0.1:1", insecure=True), Policy())


def replace_base(base: str) -> ServerHello:
    return ServerHello(**{**vars(HELLO), "base": base})


def test_only_this_user_reaches_the_workers_socket() -> None:
    with supervisor.listening() as listener:
        path = Path(listener.getsockname())
        assert path.is_socket()
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not path.parent.exists()


def test_home_is_where_it_was(anther: Path) -> None:
    assert paths.words() == anther / "node.conf"
