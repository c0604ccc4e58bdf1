"""`anther device forget` deletes everything it should and nothing else; the ledger always stays."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from client.cli import ledger
from client.cli.forget import main
from client.paths import device_files
from client.store.open import inspect_store, open_store
from privacy.ledger.ledger import JOURNAL
from privacy.storage import FileStorage
from tests.client.store.test_open import FEDERATION, fill
from tests.helpers.kills import durable_calls, killed_before
from tests.privacy.ledger.test_ledger import FIRST, free, replace

KEPT = ("ledger.jsonl", "enrolled", "seed", "version", "lock", "policy.toml", "federation")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    for name in ("ANTHER_KEY_FILE", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def files(home: Path) -> FileStorage:
    """Files of a device that was in three federations, one of them without an id, and whose ledger was reset once."""
    assert home.name == "home"
    result = device_files("pi")
    with open_store(result) as opened:
        fill(opened.store)
    ledger.reset(result, confirmed=True)
    for federation in (None, "a" * 64, FEDERATION):
        with open_store(result, federation=federation) as opened:
            fill(opened.store)
    (result.folder / "policy.toml").write_text("max_epsilon = 4.0\n")
    (result.folder / "notes.txt").write_text("the owner's own")
    (result.folder / ".personal.safetensors.abcdefg_").write_bytes(b"left by a killed write")
    return result


def names(files: FileStorage) -> set[str]:
    return {path.relative_to(files.folder).as_posix() for path in files.folder.rglob("*") if path.is_file()}


def run(arguments: Sequence[str]) -> int:
    return main(["--name", "pi", *arguments])


def test_forget_last_federation(files: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(files)
    entries = inspect_store(files).store.ledger.entries()
    assert run(["--yes"]) == 0
    output = capsys.readouterr().out
    for word in (
        "9 files",
        FEDERATION,
        str(files.folder),
        "part of the shared adapter",
        "anther device ledger",
        "not overwritten",
    ):
        assert word in output
    gone = before - names(files)
    assert {name.split("/")[1] for name in gone if name.startswith("federations")} == {FEDERATION}
    assert {name for name in gone if not name.startswith("federations")} == {
        "cache/base.json",
        "cache/train.safetensors",
        ".personal.safetensors.abcdefg_",
    }
    assert not (files.folder / "federations" / FEDERATION).exists()
    assert not (files.folder / "cache").exists()
    assert inspect_store(files).store.ledger.entries() == entries
    assert run(["--yes"]) == 0
    assert "nothing was learned here" in capsys.readouterr().out


def test_forget_federation_by_id(files: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--federation", "a" * 64, "--yes"]) == 0
    assert not (files.folder / "federations" / ("a" * 64)).exists()
    assert (files.folder / "federations" / FEDERATION / "personal.safetensors").exists()
    assert run(["--federation", "a" * 64, "--yes"]) == 2
    assert f"it has files of: {FEDERATION}" in capsys.readouterr().err
    assert run(["--federation", "../..", "--yes"]) == 2


def test_forget_all_federations(files: FileStorage) -> None:
    before = names(files)
    assert run(["--all", "--yes"]) == 0
    remaining = names(files)
    assert remaining == {
        name
        for name in before
        if name.split("/")[-1] in KEPT or "outbox/" in name or name in ("notes.txt", "forgotten-1/head")
    }
    assert any(name.startswith("forgotten-1/") and name.endswith(JOURNAL) for name in remaining)
    assert not (files.folder / "federations").exists()
    assert len(inspect_store(files).store.ledger.entries()) == 1


def test_forget_needs_confirmation(files: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(files)
    for arguments in ([], ["--all"], ["--federation", "a" * 64]):
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert "confirm with --yes" in error
        assert error.count("\n") == 1
    assert names(files) == before
    with open_store(files):
        assert run(["--yes"]) == 2
    assert "in use" in capsys.readouterr().err
    assert main(["--name", "nobody", "--yes"]) == 2
    files.write("version", b"9\n")
    assert run(["--yes"]) == 2


def test_forget_needs_no_key(files: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    monkeypatch.setenv("ANTHER_KEY_FILE", str(key))
    with open_store(files, encrypt="auto"):
        pass
    monkeypatch.delenv("ANTHER_KEY_FILE")
    assert run(["--all", "--yes"]) == 0
    monkeypatch.setenv("ANTHER_KEY_FILE", str(key))
    opened = inspect_store(files).store
    assert len(opened.ledger.entries()) == 1
    opened.ledger.reserve(replace(FIRST, round=9), free)


@pytest.mark.integration
def test_forget_can_be_repeated_after_kill(files: FileStorage, tmp_path: Path) -> None:
    def forgotten() -> None:
        assert run(["--all", "--yes"]) == 0

    copy = tmp_path / "copy"
    shutil.copytree(files.folder, copy)
    calls = durable_calls(forgotten, tmp_path / "trace")
    for call in range(0, len(calls), 5):
        shutil.rmtree(files.folder)
        shutil.copytree(copy, files.folder)
        killed_before(call, forgotten)
        forgotten()
        assert not list(files.folder.rglob("personal.safetensors"))
        assert not (files.folder / "federations").exists()
        assert len(inspect_store(files).store.ledger.entries()) == 1
