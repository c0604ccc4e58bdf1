"""`anther device leave` deletes the keys, and keeps the store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.cli.leave import main
from client.paths import device_files
from client.store.open import inspect_store, open_store
from client.store.store import PersonalAdapter
from tests.client.store.test_open import FEDERATION
from tests.helpers.devices import BASE, SITES, adapter
from tests.helpers.kills import durable_calls, killed_before


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home of a device enrolled as pi, with its store on a memory card."""
    result = tmp_path / "home"
    monkeypatch.setenv("ANTHER_HOME", str(result))
    (result / "link").mkdir(parents=True)
    (result / "link" / "node.key").write_text("a private key")
    (result / "link" / "ca.pem").write_text("an authority")
    (result / "node.conf").write_text(f"name=pi\nstore={tmp_path / 'card'}\nconnection.address=leaf.example:9092\n")
    with open_store(device_files("pi", tmp_path / "card"), federation=FEDERATION) as opened:
        opened.store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, "run:1"))
    return result


def test_leave_deletes_keys_and_keeps_store(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--yes"]) == 0
    output = capsys.readouterr().out
    for word in (
        "leaf.example:9092",
        "revoke",
        str(tmp_path / "card"),
        "anther device forget",
        "part of the shared adapter",
    ):
        assert word in output
    assert not (home / "link").exists()
    assert not (home / "node.conf").exists()
    stored = inspect_store(device_files("pi", tmp_path / "card")).store.personal(SITES)
    assert stored is not None  # still usable, and found through the last federation
    assert main(["--yes"]) == 2
    assert "this device is in no federation" in capsys.readouterr().err


def test_leave_needs_confirmation_and_lock(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "confirm with --yes" in capsys.readouterr().err
    with open_store(device_files("pi", tmp_path / "card")):
        assert main(["--yes"]) == 2
    assert "in use" in capsys.readouterr().err
    assert (home / "link" / "node.key").exists()
    assert (home / "node.conf").exists()


@pytest.mark.integration
def test_leave_can_be_repeated_after_kill(home: Path, tmp_path: Path) -> None:
    def leave() -> None:
        assert main(["--yes"]) == 0

    shutil.copytree(home, tmp_path / "copy")
    calls = durable_calls(leave, tmp_path / "trace")
    for call in range(len(calls)):
        shutil.rmtree(home)
        shutil.copytree(tmp_path / "copy", home)
        killed_before(call, leave)
        if (home / "link").exists() or (home / "node.conf").exists():
            leave()
        assert not (home / "link").exists()
        assert not (home / "node.conf").exists()


def test_leave_with_unreadable_configuration(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "node.conf").write_text("name='")
    assert main(["--yes"]) == 2
    assert "node.conf" in capsys.readouterr().err
    assert main(["--yes", "--name", "pi"]) == 0
    assert not (home / "link").exists()
