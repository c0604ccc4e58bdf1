"""A device keeps its own store even if it is renamed, and never starts a second one silently."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client import paths
from client.cli import forget, leave, ledger
from client.paths import device_files, enrolled_files, find_files, remember
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
    """Release one round of the device with this name."""
    files = enrolled_files(name, None)
    DeviceLedger(files).reserve(replace(FIRST, round=number), free)
    remember(files)


def test_renamed_device_keeps_ledger(anther: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares("pi", 1)
    shares("my-pi", 2)
    shares("pi", 3)
    assert len(DeviceLedger(enrolled_files("pi-3", None)).entries()) == 3
    assert [path.name for path in (anther / "devices").iterdir()] == ["pi"]
    (anther / "node.conf").write_text("name=another\n")
    assert len(DeviceLedger(find_files(None, None)).entries()) == 3
    shutil.copytree(anther, anther.with_name("copy"))
    monkeypatch.setenv("ANTHER_HOME", str(anther.with_name("copy")))
    assert (
        enrolled_files("pi", None).folder == anther.with_name("copy") / "devices" / "pi"
    )  # not the home that this one was copied from


def test_renamed_device_without_record_is_refused(anther: Path) -> None:
    """Earlier versions of Anther did not record the store."""
    DeviceLedger(device_files("pi")).reserve(FIRST, free)
    with pytest.raises(
        AntherError, match=r"set store=\S+/devices/pi; if it is a new device, set store=\S+/devices/my-pi$"
    ) as error:
        enrolled_files("my-pi", None)
    assert len(DeviceLedger(enrolled_files("pi", None)).entries()) == 1
    suggestions = [word.partition("=")[2].rstrip(";") for word in str(error.value).split() if word.startswith("store=")]
    assert (
        len(DeviceLedger(enrolled_files("my-pi", suggestions[0])).entries()) == 1
    )  # its head is stored under the old name
    assert not DeviceLedger(enrolled_files("my-pi", suggestions[1])).entries()
    assert not (anther / "store").exists()


def test_new_device_next_to_simulated_ones(anther: Path) -> None:
    (anther / "devices" / "empty").mkdir(parents=True)
    assert enrolled_files("pi", None).folder == anther / "devices" / "pi"


def test_forget_after_leave_finds_store(anther: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares("ada-laptop")
    (anther / "node.conf").write_text("name=ada-laptop\nconnection.address=leaf.example:9092\n")
    (anther / "devices" / "ada-laptop" / "personal.safetensors").write_bytes(b"learnt")
    assert leave.main(["--yes"]) == 0
    assert forget.main(["--yes"]) == 0
    assert "Deleted from" in capsys.readouterr().out
    assert not (anther / "devices" / "ada-laptop" / "personal.safetensors").exists()
    assert ledger.main([]) == 0
    assert "shared with run" in capsys.readouterr().out
    assert ledger.main(["--store", str(tmp_path / "lost")]) == 2
    assert "no store in this folder" in capsys.readouterr().err
    assert ledger.main(["--name", "lost"]) == 2


def node(data: Path) -> NodeConfig:
    result = NodeConfig(data=str(data), name="pi")
    result.connection.address = "127.0.0.1:1"
    return result


@pytest.mark.integration
def test_errors_come_before_any_request(anther: Path, tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="no such folder"):
        supervisor.run(node(tmp_path / "nowhere"))
    (anther / "devices" / "pi").mkdir(parents=True)
    (anther / "devices" / "pi" / "policy.toml").write_text("max_epsilom = 4\n")
    with pytest.raises(AntherError, match="max_epsilom"):
        supervisor.run(node(tmp_path))


@pytest.mark.integration
def test_picture_check_ends_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client.cli.check", "--quiet", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}")
    assert done.stderr.count("\n") == 1


def test_base_not_allowed_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerConnection, "hello", lambda _: HELLO)
    monkeypatch.setattr(supervisor.server_connection, "skew", lambda _: 0.0)
    monkeypatch.setattr(supervisor, "ensure_base", lambda *_: pytest.fail("asked for it"))
    with pytest.raises(AntherError, match="not listed in `bases`"):
        supervisor.wait_for_server(
            NodeConfig(), ServerConnection("127.0.0.1:1", insecure=True), Policy(bases=("a" * 64,))
        )


def test_server_cannot_name_hub_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerConnection, "hello", lambda _: replace_base("attacker/evil-model"))
    monkeypatch.setattr(supervisor, "ensure_base", lambda *_: pytest.fail("asked for it"))
    with pytest.raises(AntherError, match="64 hex digits"):
        supervisor.wait_for_server(NodeConfig(), ServerConnection("127.0.0.1:1", insecure=True), Policy())


def replace_base(base: str) -> ServerHello:
    return ServerHello(**{**vars(HELLO), "base": base})


def test_worker_socket_is_private() -> None:
    with supervisor.worker_socket() as listener:
        path = Path(listener.getsockname())
        assert path.is_socket()
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not path.parent.exists()


def test_default_home_is_unchanged(anther: Path) -> None:
    assert paths.config_file() == anther / "node.conf"
