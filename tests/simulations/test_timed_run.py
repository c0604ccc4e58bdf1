"""Runs of a timed fleet from the command line, whole, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.simulations.test_run import ROOT, command, numbers, run

WEEK = [
    "fleet=week",
    "cohort.size=3",
    "data.writers=6",
    "evaluation.gallery_size=0",
    "evaluation.baseline_local=false",
    "adapter.personal.steps=2",
    "tracker.tensorboard=false",
]


@pytest.mark.stress
def test_killed_and_resumed_timed_run_gives_same_results(pipeline_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "ANTHER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = run(pipeline_folder, tmp_path / "whole", environment, *WEEK)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert 0 < summary["fleet"]["hours"] <= 3
    assert sum(summary["fleet"]["rounds"].values()) > 0
    assert "simulated" in (tmp_path / "whole" / "report.html").read_text()
    killed = tmp_path / "killed"
    with subprocess.Popen(
        command(pipeline_folder, killed, *WEEK), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "round 1 of 3" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert run(pipeline_folder, killed, environment, *WEEK, "resume=true").returncode == 0
    assert numbers(killed) == numbers(tmp_path / "whole")
