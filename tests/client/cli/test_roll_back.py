"""`anther device roll-back`."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.cli.roll_back import main
from client.store.store import PersonalAdapter, Store
from privacy.storage import FileStorage
from tests.helpers.devices import BASE, SITES, adapter


@pytest.mark.parametrize("asked", ["store", "name", "nothing"])
def test_roll_back_once(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command finds the device like all owner's commands."""
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    monkeypatch.setattr("platform.node", lambda: "tablet")
    folder = {"store": tmp_path / "card", "name": tmp_path / "devices/camera", "nothing": tmp_path / "devices/tablet"}
    arguments = {"store": ["--store", str(folder["store"])], "name": ["--name", "camera"], "nothing": []}[asked]
    store = Store(FileStorage(folder[asked]))
    for number in (1, 2):
        made = PersonalAdapter(adapter(2), adapter(3, seed=number), BASE, f"run:{number}")
        store.save_personal(made, aside=True)
    assert main(arguments) == 0
    assert str(folder[asked]) in capsys.readouterr().out
    found = store.personal(SITES)
    assert found is not None
    assert found.request == "run:1"
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "no previous adapter" in errors
    assert main([*arguments, "--list"]) == 0
    newest, oldest = capsys.readouterr().out.splitlines()
    assert oldest.endswith("(in use)")
    assert main([*arguments, "--to", newest.split()[0]]) == 0
    found = store.personal(SITES)
    assert found is not None
    assert found.request == "run:2"
