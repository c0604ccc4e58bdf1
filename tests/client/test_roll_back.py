"""The owner's way back, at the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.roll_back import main
from client.store import Personal, Store
from privacy.storage import Files
from tests.client.devices import BASE, SITES, adapter


def test_back_once_and_no_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(Files(tmp_path))
    for number in (1, 2):
        made = Personal(adapter(2), adapter(3, seed=number), BASE, f"run:{number}")
        store.save_personal(made, aside=True)
    assert main(["--store", str(tmp_path)]) == 0
    found = store.personal(SITES)
    assert found is not None
    assert found.request == "run:1"
    assert main(["--store", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "no previous adapter" in errors
