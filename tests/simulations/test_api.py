"""`simulate` from Python, the command that resumes a run, and old terminals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from common.errors import AntherError
from simulations import simulate
from simulations.run import resume_command
from tests.helpers.simulations import BARE, TINY, run


@pytest.mark.integration
def test_simulate_returns_its_results(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    words = [f"base.path={pipeline_folder}", *TINY, *BARE, "rounds=1", "data.writers=1"]
    result = simulate(words, tmp_path / "run")
    assert result.summary["loss"].keys() == {"base", "shared", "personal"}
    assert result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.report.read_text().count("data.writers=1") >= 1
    assert (result.adapters / "shared.safetensors").exists()
    assert "round" not in capsys.readouterr().out  # without a display
    with pytest.raises(AntherError, match="already holds a run"):
        simulate(words, tmp_path / "run")


def test_pictures_are_checked_before_the_base_is_loaded(tmp_path: Path) -> None:
    """The base doesn't exist, but the error is about the pictures."""
    (tmp_path / "photos").mkdir()
    with pytest.raises(AntherError, match=r"metadata\.jsonl: missing"):
        simulate(["base.path=/nowhere", f"data.pictures=[{tmp_path / 'photos'}]"], tmp_path / "run")


@pytest.mark.parametrize("folder", ["Jürgen", "My Projects (old)", "it's", "50% a=b"])
def test_resume_command_is_quoted_for_shell_and_hydra(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = resume_command(["data.pictures=['a b']", "hydra.run.dir=x", "resume=false"], Path("/tmp") / folder)
    start, words = shlex.split(typed)[:3], shlex.split(typed)[3:]
    assert start == ["python", "-m", "simulations.run"]
    values = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words)}
    assert values == {"data.pictures": ["a b"], "hydra.run.dir": f"/tmp/{folder}", "resume": True}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_old_terminals_work(pipeline_folder: Path, tmp_path: Path, encoding: str) -> None:
    done = run(pipeline_folder, tmp_path / "run", "data.pictures=[/nowhere]", encoding=encoding)
    assert done.returncode == 2
    assert "loading the base ..." in done.stdout
    assert done.stderr.startswith("error: /nowhere: no such folder")
