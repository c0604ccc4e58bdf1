"""`anther device status` reads the device's files and changes none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from client.cli.status import NOT_ENROLLED, main
from client.paths import device_files, keys_folder
from common import file_lock
from privacy.accounting import NonPrivate
from privacy.ledger.ledger import MEASURE, DeviceLedger
from tests.privacy.ledger.test_ledger import FIRST, free, replace


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("platform.node", lambda: "tablet")
    return tmp_path / "home"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def enroll(home: Path) -> None:
    home.mkdir()
    (home / "node.conf").write_text(
        "name=tablet\ndata=photos\nconnection.address=here:1\nfederation=0123456789abcdef\n"
    )


def test_new_device(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert NOT_ENROLLED in shown(capsys)
    assert json.loads(shown(capsys, "--json"))["updates"] == 0
    assert not home.exists()  # showing writes nothing


def test_enrolled_device(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enroll(home)
    ledger = DeviceLedger(device_files("tablet"))
    ledger.reserve(FIRST, free, settles=True)
    ledger.seal(FIRST, b"reply")
    ledger.reserve(replace(FIRST, purpose=MEASURE, release=False), free)
    text = shown(capsys)
    assert "0123456789abcdef at here:1" in text
    assert "stopped: start it with anther device run" in text
    assert "updates: 1, evaluations: 1, runs: 1; the last on " in text
    assert "personal adapter  none yet" in text
    assert json.loads(shown(capsys, "--json"))["epsilon"] > 0


def test_shared_without_noise(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enroll(home)
    ledger = DeviceLedger(device_files("tablet"))
    ledger.reserve(replace(FIRST, mechanism=NonPrivate(), release=False), free)
    assert "without noise" in shown(capsys)
    assert json.loads(shown(capsys, "--json"))["epsilon"] is None


def test_running_device(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enroll(home)
    with file_lock.exclusive(keys_folder(), what="the device"):
        assert f"waiting for the server (process {os.getpid()})" in shown(capsys)
        with file_lock.exclusive(device_files("tablet").folder, what="the store"):
            assert "working: the base is in memory" in shown(capsys)
    assert file_lock.holder(keys_folder()) is None
