"""The program `anther` runs every command, and no module of the working directory."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from anther import cli
from anther.commands import Command, benchmarks
from common import processes

ROOT = Path(__file__).parents[2]
SHADOWS = ("client", "server", "simulations", "models", "conf", "anther")


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """A folder like that of a Flower tutorial, with modules that have the names of Anther's."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    return tmp_path


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as written by pip, in its own folder."""
    file = tmp_path_factory.mktemp("bin") / "anther"
    file.write_text(f"#!{sys.executable}\nimport sys\nfrom anther.cli import main\nsys.exit(main())\n")
    file.chmod(0o755)
    return file


def run(program: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "ANTHER_HOME": str(folder / "home")}
    return subprocess.run(
        [str(program), *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.integration
@pytest.mark.parametrize("words", [("keys", "--help"), ("device", "ledger", "--help"), ("client.cli.forget", "--help")])
def test_modules_of_the_folder_are_not_imported(program: Path, tutorial: Path, words: tuple[str, ...]) -> None:
    done = run(program, tutorial, *words)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
    assert "wrong module" not in done.stdout + done.stderr


@pytest.mark.integration
def test_child_processes_import_our_modules(tutorial: Path) -> None:
    done = subprocess.run(
        processes.python("server.report.results", "--help"),
        cwd=tutorial,
        env=processes.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "wrong module" not in done.stdout + done.stderr


def test_child_processes_are_started_safely() -> None:
    rooms = (
        "anther",
        "client",
        "common",
        "conf",
        "models",
        "privacy",
        "protocol",
        "server",
        "simulations",
        "strategies",
    )
    sources = {path: path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert len(sources) > 100
    spawned = {
        path.relative_to(ROOT).as_posix() for path, text in sources.items() if re.search(r'executable,\s*"-', text)
    }
    assert spawned == {"common/processes.py"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)
    assert all(f"\n{title}\n" in listed for title in cli.GROUPS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_group_help_lists_its_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["device", flag]) == 0
    listed = capsys.readouterr().out
    assert {name for name in cli.COMMANDS if f"\n  {name} " in listed} == set(cli.group("device"))


@pytest.mark.parametrize("command", cli.COMMANDS.values(), ids=cli.COMMANDS)
def test_command_exists(command: Command) -> None:
    assert callable(importlib.import_module(command.module).main)
    assert command.help
    if command.schema:
        module, _, name = command.schema.partition(":")
        assert is_dataclass(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulat"], "did you mean anther simulate?"),
        (["device"], "needs one of: enroll, run"),
        (["device", "enrol"], "needs one of: enroll"),
        (["device", "ledge"], "did you mean anther device ledger?"),
        (["xyzzy"], "anther --help"),
        (["client.enroll"], "client.enroll: moved to anther device enroll"),
    ],
)
def test_unknown_command_gets_a_hint(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == cli.USAGE
    assert said in capsys.readouterr().err


@pytest.mark.integration
def test_arguments_reach_the_command(program: Path, tmp_path: Path) -> None:
    done = run(program, tmp_path, "simulate", "rounds=0")
    assert (done.returncode, done.stderr) == (2, "error: rounds=0: must be 1 or more\n")


@pytest.mark.integration
@pytest.mark.parametrize("words", [["--help"], ["device", "ledger"], ["simulate", "--help"]])
def test_closed_pipe_is_no_error(words: list[str], tmp_path: Path) -> None:
    """`anther device ledger | head` ends without a message."""
    reader, writer = os.pipe()
    os.close(reader)
    home = {"ANTHER_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "anther", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | home, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.USAGE, "")


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 0
    listed = capsys.readouterr().out
    assert {"gate", "soak", "federation"} <= benchmarks().keys()
    assert all(f"  {name} " in listed and summary in listed for name, (_, summary) in benchmarks().items())


def test_unknown_benchmark_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gat"]) == cli.USAGE
    assert capsys.readouterr().err == "error: anther bench gat: no such benchmark; did you mean gate?\n"


def test_caller_keeps_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook", "x"])
    assert cli.main(["bench", "nothing"]) == cli.USAGE
    assert sys.argv == ["notebook", "x"]


def test_benchmark_gets_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "gate", "--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_benchmarks_of_an_installation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cli.main(["bench", "gate"]) == cli.USAGE
    assert "run it in a checkout" in capsys.readouterr().err
