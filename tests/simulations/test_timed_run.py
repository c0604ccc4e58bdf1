"""Runs of a timed fleet from the command line, whole, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.helpers.simulations import interrupt, results, run

WEEK = [
    "fleet=week",
    "cohort.size=3",
    "data.writers=6",
    "evaluation.gallery_size=0",
    "evaluation.baseline_local=false",
    "adapter.personal.steps=2",
    "tracker.tensorboard=false",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))


@pytest.mark.integration
def test_timed_run_reports_its_fleet(pipeline_folder: Path, tmp_path: Path) -> None:
    done = run(pipeline_folder, tmp_path / "run", *WEEK)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["fleet"]["hours"] <= 3
    assert sum(summary["fleet"]["rounds"].values()) > 0
    assert "simulated" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.stress
@pytest.mark.parametrize("phase", ["round 1 of 3", "round 2 of 3", "personalizing"])
def test_killed_and_resumed_timed_run_gives_same_results(pipeline_folder: Path, tmp_path: Path, phase: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(pipeline_folder, whole, *WEEK).returncode == 0
    code, _, errors = interrupt(pipeline_folder, killed, *WEEK, line=phase, number=signal.SIGKILL)
    assert code == -signal.SIGKILL, errors
    assert run(pipeline_folder, killed, *WEEK, "resume=true").returncode == 0
    assert results(killed) == results(whole)
