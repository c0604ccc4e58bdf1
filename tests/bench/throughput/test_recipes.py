"""Tests of the recipe benchmark: ends of rounds and medians of ratios."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.throughput.recipes import RecipeTiming, compare, read_metrics, run_ray_recipe, run_until_round, table


def test_ratios_are_paired_by_repeat() -> None:
    runs = {
        "cohort": [
            RecipeTiming(1.0, [2.0, 1.0, 1.0]),
            RecipeTiming(2.0, [4.0, 2.0, 2.0]),
            RecipeTiming(1.0, [1.0, 1.0, 1.0]),
        ],
        "serial": [
            RecipeTiming(1.0, [5.0, 2.0, 2.0]),
            RecipeTiming(2.0, [10.0, 4.0, 4.0]),
            RecipeTiming(1.0, [1.0, 9.0, 9.0]),
        ],
    }
    ratios = compare(runs)["serial"]
    assert ratios["total"] == pytest.approx(2.0)
    assert ratios["round"] == pytest.approx(2.0)
    assert table(runs).row_count == 2


SIMULATION = """
import json, sys, time
with open(sys.argv[1], "w") as metrics:
    for number in range(4):
        time.sleep(0.3)
        print(json.dumps({"round": number, "seconds": 0.3}), file=metrics, flush=True)
    print('{"round": 4, "sec', end="", file=metrics, flush=True)
time.sleep(600)
"""


@pytest.mark.integration
def test_simulation_is_ended_after_its_round(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SIMULATION, str(tmp_path / "metrics.jsonl")]
    assert 1.2 <= run_until_round(command, tmp_path, 3) < 60
    assert [line["round"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]  # incomplete lines are ignored


@pytest.mark.integration
def test_early_exit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3 after no round"):
        run_until_round([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 2)


def test_recipe_times_are_read_from_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    output = 'starting …\n{"startup": 3.5, "rounds": [2.0, 1.0]}\n'
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, output))
    assert run_ray_recipe("published", 2) == RecipeTiming(3.5, [2.0, 1.0])
    assert run_ray_recipe("published", 2).total == 6.5
