"""Former commands are refused in one line that names the present one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from anther.cli import find
from common.moved_commands import MOVED, MovedCommandFinder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", MOVED)
def test_former_command_is_refused(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", "rounds=3"])
    with pytest.raises(SystemExit) as stop:
        MovedCommandFinder().find_spec(module, None)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: python -m {module}: moved to {MOVED[module]}\n"


@pytest.mark.parametrize("command", sorted(set(MOVED.values())))
def test_present_command_exists(command: str) -> None:
    if command.startswith("python -m "):
        assert importlib.util.find_spec(command.removeprefix("python -m ")) is not None
    else:
        assert find(command.split()[1:]) is not None


@pytest.mark.integration
@pytest.mark.parametrize("module", ["client.enroll", "simulations.audit", "bench.gate", "bench.quality"])
def test_python_refuses_it(module: str) -> None:
    """Also where a package has the former name."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: python -m {module}: moved to {MOVED[module]}\n"


def test_import_is_unchanged() -> None:
    assert importlib.util.find_spec("client.enroll") is None
