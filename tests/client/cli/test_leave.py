"""Who leaves can't be spoken for any more, and keeps what is theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.cli.leave import main
from client.cli.paths import device_files
from client.store.open import inspect_store, open_store
from client.store.store import PersonalAdapter
from tests.client.store.test_open import FEDERATION
from tests.helpers.devices import BASE, SITES, adapter
from tests.helpers.kills import counted, killed_before


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a device that was enrolled as pi, with its store on a card."""
    found = tmp_path / "home"
    monkeypatch.setenv("ANTHER_HOME", str(found))
    (found / "link").mkdir(parents=True)
    (found / "link" / "node.key").write_text("a private key")
    (found / "link" / "ca.pem").write_text("an authority")
    (found / "node.conf").write_text(f"name=pi\nstore={tmp_path / 'card'}\nlink.address=leaf.example:9092\n")
    with open_store(device_files("pi", tmp_path / "card"), federation=FEDERATION) as mine:
        mine.store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, "run:1"))
    return found


def test_what_it_undoes_and_what_it_cant(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--yes"]) == 0
    said = capsys.readouterr().out
    for word in (
        "leaf.example:9092",
        "revoke",
        str(tmp_path / "card"),
        "client.cli.forget",
        "part of the shared adapter",
    ):
        assert word in said
    assert not (home / "link").exists()
    assert not (home / "node.conf").exists()
    kept = inspect_store(device_files("pi", tmp_path / "card")).store.personal(SITES)
    assert kept is not None  # of use as before, and found by the federation that the device was in last
    assert main(["--yes"]) == 2
    assert "this device is in no federation" in capsys.readouterr().err


def test_it_must_be_meant_and_nobody_at_work(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "say --yes" in capsys.readouterr().err
    with open_store(device_files("pi", tmp_path / "card")):
        assert main(["--yes"]) == 2
    assert "in use" in capsys.readouterr().err
    assert (home / "link" / "node.key").exists()
    assert (home / "node.conf").exists()


def test_killed_on_the_way_it_can_be_done_again(home: Path, tmp_path: Path) -> None:
    def left() -> None:
        assert main(["--yes"]) == 0

    shutil.copytree(home, tmp_path / "copy")
    calls = counted(left, tmp_path / "trace")
    for call in range(len(calls)):
        shutil.rmtree(home)
        shutil.copytree(tmp_path / "copy", home)
        killed_before(call, left)
        if (home / "link").exists() or (home / "node.conf").exists():
            left()
        assert not (home / "link").exists()
        assert not (home / "node.conf").exists()


def test_with_words_that_cant_be_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "node.conf").write_text("name='")
    assert main(["--yes"]) == 2
    assert "node.conf" in capsys.readouterr().err
    assert main(["--yes", "--name", "pi"]) == 0
    assert not (home / "link").exists()
