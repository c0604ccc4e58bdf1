"""`anther device roll-back`."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.cli.roll_back import main
from client.store.store import PersonalAdapter, Store
from privacy.storage import FileStorage
from tests.helpers.devices import BASE, SITES, adapter


@pytest.mark.parametrize("option", ["store", "name", "nothing"])
def test_roll_back_once(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command finds the device like all owner's commands."""
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    monkeypatch.setattr("platform.node", lambda: "tablet")
    folder = {"store": tmp_path / "card", "name": tmp_path / "devices/camera", "nothing": tmp_path / "devices/tablet"}
    arguments = {"store": ["--store", str(folder["store"])], "name": ["--name", "camera"], "nothing": []}[option]
    store = Store(FileStorage(folder[option]))
    for number in (1, 2):
        created = PersonalAdapter(adapter(2), adapter(3, seed=number), BASE, f"run:{number}")
        store.save_personal(created, aside=True)
    assert main(arguments) == 0
    assert str(folder[option]) in capsys.readouterr().out
    result = store.personal(SITES)
    assert result is not None
    assert result.request == "run:1"
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "no previous adapter" in errors
    assert main([*arguments, "--list"]) == 0
    newest, oldest = capsys.readouterr().out.splitlines()
    assert oldest.endswith("(in use)")
    assert main([*arguments, "--to", newest.split()[0]]) == 0
    result = store.personal(SITES)
    assert result is not None
    assert result.request == "run:2"
