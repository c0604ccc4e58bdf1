"""A server with a finished run starts no other on its own, for example after a reboot."""

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


@pytest.mark.integration
@pytest.mark.parametrize(("words", "refused"), [([], True), (["server.allow_rerun=true"], False)])
def test_finished_run_is_not_restarted(tmp_path: Path, words: list[str], refused: bool) -> None:
    folder = run_dirs.run_folder(" ".join(run_overrides(WORDS, 100)), tmp_path / "runs")
    run_dirs.mark_finished(folder)
    # A folder that can't be created ends a server quickly if it gets any further.
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


@pytest.mark.integration
def test_second_server_is_refused(tmp_path: Path) -> None:
    """A second server would register the same devices with another SuperLink."""
    command = [sys.executable, "-m", "server.supervisor.run", *WORDS, "server.hostnames=[127.0.0.1]"]
    environment = {**os.environ, "ANTHER_HOME": str(tmp_path)}
    with exclusive(tmp_path / "server", what="a federation"):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert (done.returncode, "is in use by process" in done.stderr) == (2, True), done.stderr
