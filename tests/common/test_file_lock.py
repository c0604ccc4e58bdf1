"""A store belongs to one process at a time; the lock is released when its holder ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from client.cli.roll_back import main
from client.store.open import inspect_store, open_for_owner, open_store
from client.store.store import PersonalAdapter
from common import file_lock
from common.errors import AntherError
from privacy.storage import FileStorage
from tests.helpers.devices import BASE, SITES, adapter


def open_store_in_child(files: FileStorage) -> tuple[int, int]:
    """A child process that has the store open, and a pipe that lets it exit when closed."""
    ready, says = os.pipe()
    waits, go = os.pipe()
    if (child := os.fork()) == 0:
        os.close(go)
        with open_store(files):
            os.write(says, b".")
            os.read(waits, 1)
        os._exit(0)
    os.close(waits)
    assert os.read(ready, 1) == b"."
    return child, go


@pytest.mark.integration
def test_second_process_is_refused(tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "store")
    child, go = open_store_in_child(files)
    with (
        pytest.raises(AntherError, match=rf"the store is in use by process {child}: wait for it, or stop it") as raised,
        open_store(files),
    ):
        pass
    assert "\n" not in str(raised.value)
    assert inspect_store(files).storage.read("seed") is None  # reading needs no lock
    os.close(go)
    os.waitpid(child, 0)
    with open_store(files):
        pass


@pytest.mark.integration
def test_killed_process_releases_the_lock(tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "store")
    child, _ = open_store_in_child(files)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open_store(files):
        pass


def test_lock_is_exclusive_within_a_process(tmp_path: Path) -> None:
    with (
        open_store(FileStorage(tmp_path)),
        pytest.raises(AntherError, match="in use"),
        open_store(FileStorage(tmp_path)),
    ):
        pass
    with file_lock.exclusive(tmp_path, what="the store"):
        pass


@pytest.mark.integration
def test_owner_command_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    files = FileStorage(tmp_path / "devices" / "pi")
    with open_store(files) as ours:
        for number in (1, 2):
            ours.store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, f"run:{number}"), aside=True)
    child, go = open_store_in_child(files)
    assert main(["--name", "pi"]) == 2
    assert "in use by process" in capsys.readouterr().err
    assert main(["--name", "nobody"]) == 2
    assert "no store in this folder" in capsys.readouterr().err
    assert not (tmp_path / "devices" / "nobody").exists()
    os.close(go)
    os.waitpid(child, 0)
    assert main(["--name", "pi"]) == 0
    with open_for_owner(files) as ours:
        result = ours.store.personal(SITES)
    assert result is not None
    assert result.request == "run:1"


def test_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(AntherError, match="can't be created"), file_lock.exclusive(tmp_path, what="the store"):
        pass
    assert (tmp_path / "precious").read_text() == "x"
