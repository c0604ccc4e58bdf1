"""`anther device ledger` shows the ledger, and starts a new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.cli.ledger import FRESH, main
from client.paths import device_files
from client.store.layout import LOCAL_FACTORS, METHOD_STATE, RESIDUAL, VARIATE
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.ledger.ledger import JOURNAL, MARKER, MEASURE, DeviceLedger
from tests.privacy.ledger.test_ledger import FIRST, KEY, PLAN, free, replace

SECOND = replace(FIRST, round=2, data="e" * 64)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("platform.node", lambda: "tablet")
    return tmp_path / "home"


@pytest.fixture
def ledger(home: Path) -> DeviceLedger:
    """Ledger of this machine's device: one round received, one sealed, one evaluation reserved."""
    assert home.name == "home"
    files = DeviceLedger(device_files("tablet"))
    for created in (FIRST, SECOND):
        files.reserve(created, free, settles=True)
        files.seal(created, b"reply")
    files.reserve(replace(SECOND, purpose=MEASURE, release=False), free)
    return files


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_ledger_of_new_device(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == FRESH + "\n"
    assert json.loads(shown(capsys, "--json"))["entries"] == []
    assert shown(capsys, "reset", "--forget") == FRESH + "\n"
    assert not home.exists()  # showing writes nothing


@pytest.mark.usefixtures("ledger")
def test_table_shows_releases_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert text.count("run/../Ω") == 1
    for word in ("reply received", "reply sealed", "charged", "adapter update", "evaluation", "no: test"):
        assert word in text
    assert "σ=2 C=0.01 q=0.2, 25 steps" in text
    assert "sets no max_epsilon" in text
    assert "Made with reproducible test noise, which protects nothing: 1 of 3." in text
    assert "there were 2 sets" in text
    assert "7 events" in text


def test_epsilon_is_the_ledgers(ledger: DeviceLedger, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "devices/tablet/policy.toml").write_text("max_epsilon = 4.0\ndelta = 1e-3")
    spent, strict = ledger.spent(1e-3), ledger.spent(1e-5).value
    assert f"ε={spent.value:.3g} per image (δ=0.001, add or remove one; ε={strict:.3g} at δ=1e-05)" in shown(capsys)
    assert f"ε=4 at this δ: {4 - spent.value:.3g} remains" in shown(capsys)
    values = json.loads(shown(capsys, "--json"))
    assert values["epsilon"] == {
        "value": spent.value,
        "delta": 1e-3,
        "unit": "image",
        "relation": "add_or_remove_one",
        "strict": strict,
        "seen": None,
    }
    assert values["max_epsilon"] == 4.0
    assert [entry["state"] for entry in values["entries"]] == ["sent", "sealed", "reserved"]
    assert [sorted({"reserved", "sealed", "sent"} & entry.keys()) for entry in values["entries"]] == [
        ["reserved", "sealed", "sent"],
        ["reserved", "sealed"],
        ["reserved"],
    ]
    assert values["entries"][1]["data"] == "e" * 64


def test_evaluation_is_shown_with_its_noise(ledger: DeviceLedger, capsys: pytest.CaptureFixture[str]) -> None:
    noise = PoissonGaussian(noise_multiplier=10.0, sampling_rate=1.0, steps=1)
    ledger.reserve(replace(FIRST, purpose=MEASURE, mechanism=noise, clip=0.1), free)
    (row,) = [line for line in shown(capsys).splitlines() if "σ=10" in line]
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["1", "evaluation", "σ=10 C=0.1"]


def test_no_epsilon_without_noise(ledger: DeviceLedger, capsys: pytest.CaptureFixture[str]) -> None:
    ledger.reserve(replace(FIRST, run="bare", mechanism=NonPrivate(), clip=None), free)
    assert "Shared without noise: 1 of 4, so there is no privacy guarantee" in shown(capsys)
    assert "have no dates: assume that they were sent" in shown(capsys)
    assert "without a reply yet: 1." in shown(capsys)  # replies without noise aren't sealed
    assert json.loads(shown(capsys, "--json"))["epsilon"]["value"] is None


def test_store_in_another_folder_finds_its_head(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "card"
    DeviceLedger(device_files("camera", store)).reserve(FIRST, free)
    assert (home / "heads/camera" / JOURNAL).exists()
    assert "run/../Ω" in shown(capsys, "--store", str(store))
    assert "run/../Ω" in shown(capsys, "--store", str(store), "--name", "camera")
    assert shown(capsys) == FRESH + "\n"
    (store / JOURNAL).unlink()
    assert "is missing" in failed(capsys, "--store", str(store))
    (store / MARKER).unlink()
    assert "is missing" in failed(capsys, "--store", str(store), "--name", "camera")
    shown(capsys, "--store", str(store), "--name", "camera", "reset", "--forget")
    DeviceLedger(device_files("camera", store)).reserve(FIRST, free)


def test_second_store_of_same_name_is_refused(ledger: DeviceLedger, tmp_path: Path) -> None:
    assert ledger.entries()
    with pytest.raises(Exception, match="is missing"):
        DeviceLedger(device_files("tablet", tmp_path / "new")).reserve(FIRST, free)


def test_reset_needs_confirmation_and_keeps_old_ledger(
    ledger: DeviceLedger, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = home / "devices/tablet" / JOURNAL
    old = journal.read_bytes()
    assert "reset --forget" in failed(capsys, "reset")
    assert journal.read_bytes() == old
    journal.write_bytes(old[:-9])  # no crash tears the file here, as the head shows
    assert "rolled back" in failed(capsys)
    carried = (
        RESIDUAL,
        VARIATE,
        LOCAL_FACTORS,
        METHOD_STATE,
    )  # state between rounds, derived from releases that the old ledger counts
    for name in carried:
        journal.with_name(name).write_bytes(b"?")
    text = shown(capsys, "reset", "--forget")
    assert "ε is counted from 0 again" in text
    assert (home / "devices/tablet/forgotten-1" / JOURNAL).read_bytes() in (old, old[: old[:-9].rfind(b"\n") + 1])
    assert all((home / "devices/tablet/forgotten-1" / name).exists() for name in carried)
    assert not any(journal.with_name(name).exists() for name in carried)
    assert shown(capsys) == FRESH + "\n"
    assert ledger.sealed(KEY, PLAN) is None
    ledger.reserve(FIRST, free)
    assert len(ledger.entries()) == 1


@pytest.mark.integration
def test_ledger_as_program(home: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "ANTHER_HOME": str(home)}
    command = [sys.executable, "-m", "client.cli.ledger", "--store", str(home / "x")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "no store in this folder" in done.stderr  # named explicitly, so it may be mistyped
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = subprocess.run(command[:3], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == FRESH + "\n"
    (home / "heads/x").mkdir(parents=True)
    (home / "heads/x" / JOURNAL).write_bytes(b"?")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
