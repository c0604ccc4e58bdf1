"""Memory of large fleets: none is used for devices that aren't asked or for completed rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = (
    "base.device=cpu data.writers=20 data.validation=2 data.test=2 adapter.shared.steps=1 adapter.shared.rank=2 "
    "adapter.personal.steps=1 adapter.personal.rank=2 adapter.eval_interval=1 adapter.patience=1 "
    "evaluation.timesteps=1 evaluation.gallery_size=0 evaluation.devices=3 tracker.tensorboard=false"
)

STEADY_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "131072",  # fixed: else glibc raises it, and large blocks leave holes behind
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",  # of torch's CPU kernels, by shape: 1024 take tens of rounds to fill up
}
"""Limit the memory that a process takes in its first rounds with any fleet, so that the fleet's part is visible."""


def simulate(base: Path, folder: Path, overrides: str) -> list[dict[str, Any]]:
    """Run a simulation and return the measurements of each round."""
    out = folder / "measurements.jsonl"
    script = ROOT / "tests/helpers/scale.py"
    command = [sys.executable, str(script), str(folder / "run"), str(out), f"base.path={base} {TINY} {overrides}"]
    environment = {
        **os.environ,
        **STEADY_MEMORY,
        "ANTHER_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in out.read_text().splitlines()]
    print(*rounds, sep="\n")
    return rounds


@pytest.mark.stress
def test_memory_depends_on_the_cohort_only(pipeline_folder: Path, tmp_path: Path) -> None:
    count = 300
    rounds = simulate(
        pipeline_folder, tmp_path, f"data.devices={count} cohort.size=15 rounds=6 privacy=example data.train=8"
    )
    assert [(held["asked"], held["replied"]) for held in rounds] == [(15, 15)] * 6
    assert {held["conversations"] for held in rounds} == {0}
    assert len({held["files"] for held in rounds[1:]}) == 1
    assert rounds[0]["files"] < 60
    assert [path.name for path in (tmp_path / "run/devices").iterdir()] == ["fleet.sqlite"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["clients"], summary["judged"]) == (count, 3)
    assert len(list((tmp_path / "run/adapters/personal").glob("*.with_shared.safetensors"))) == 3
    assert len(json.loads((tmp_path / "run/evaluation.json").read_text())) == 3
    first, last = rounds[2]["resident"], rounds[-1]["resident"]
    assert last < 1.05 * first, f"{last - first} bytes more after round 6 than after round 3"


@pytest.mark.stress
def test_ten_thousand_devices(pipeline_folder: Path, tmp_path: Path) -> None:
    rounds = simulate(
        pipeline_folder, tmp_path, "data.devices=10000 cohort.size=500 rounds=20 privacy=example data.train=8"
    )
    assert [(held["asked"], held["replied"]) for held in rounds] == [(500, 500)] * 20
    third, last = rounds[2]["resident"], rounds[-1]["resident"]
    assert last < 1.03 * third, f"{last / 2**20:.0f} MiB after round 20, {third / 2**20:.0f} MiB after round 3"
    assert len({held["files"] for held in rounds[1:]}) == 1
    assert {held["conversations"] for held in rounds} == {0}
