"""A server whose run is over says so, and begins no other by itself: a machine that starts again would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.file_lock import exclusive
from server.supervisor import run_dirs
from server.supervisor.run import run_overrides

ROOT = Path(__file__).parents[3]
WORDS = ["rounds=1", "cohort.size=1"]


@pytest.mark.parametrize(("words", "refused"), [([], True), (["server.allow_rerun=true"], False)])
def test_a_run_that_is_over_isnt_begun_again_by_itself(tmp_path: Path, words: list[str], refused: bool) -> None:
    folder = run_dirs.run_folder(" ".join(run_overrides(WORDS, 100)), tmp_path / "runs")
    run_dirs.mark_finished(folder)
    # A folder that can't be made ends a server that gets any further, and quickly.
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "server.supervisor.run",
        *WORDS,
        *words,
        f"server.folder={tmp_path / 'file' / 'x'}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "ANTHER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert (f"{folder}: the run of this configuration is over" in done.stderr) == refused, done.stderr


def test_two_servers_of_one_folder(tmp_path: Path) -> None:
    """The second would register the same devices with another SuperLink."""
    command = [sys.executable, "-m", "server.supervisor.run", *WORDS, "server.hostnames=[127.0.0.1]"]
    environment = {**os.environ, "ANTHER_HOME": str(tmp_path)}
    with exclusive(tmp_path / "server", what="a federation"):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert (done.returncode, "is in use by process" in done.stderr) == (2, True), done.stderr
