"""Files and commands that are missing, unreadable, or don't end."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power.system import System, to_number
from tests.helpers.power_fakes import system


def test_files_and_numbers(tmp_path: Path) -> None:
    machine = system(tmp_path, {"sys/a": "12.5", "sys/b": "twelve", "sys/c": "nan"})
    assert machine.text("sys/b") == "twelve"
    assert [machine.number(f"sys/{name}") for name in "abcd"] == [12.5, None, None, None]
    assert machine.text("sys") is None  # a folder
    assert [file.name for file in machine.glob("sys/*")] == ["a", "b", "c"]


def test_output_of_command(tmp_path: Path) -> None:
    machine = system(tmp_path, commands={"says": "so: $HOME `ls`", "fails": ""})
    assert machine.has("says")
    assert not machine.has("nobody")
    assert machine.output("says") == "so: $HOME `ls`\n"
    assert machine.output("fails") is None
    assert machine.output("nobody") is None


def test_hanging_or_invalid_command(tmp_path: Path) -> None:
    for name, text in {"hangs": "#!/bin/sh\nexec /bin/sleep 60\n", "broken": "#!/no/such/shell\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    result = System(root=tmp_path, path=str(tmp_path), timeout=0.05)
    assert result.output("hangs") is None
    assert result.output("broken") is None


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1.0), (" -2e3 ", -2000.0), ("", None), (None, None), ("inf", None), ("1,5", None)]
)
def test_parse_number(text: str | None, number: float | None) -> None:
    assert to_number(text) == number
