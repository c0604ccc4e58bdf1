"""Tests of the memory limit and of the verdict on plans."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.memory import limits
from bench.memory.limits import LimitTrial, MeasuredStep, result_row, run_limited
from client.planning.plan_search import TrainingOption, TrainingSetting
from common.units import GIB, MIB
from models.footprint.footprint import Footprint
from tests.helpers.networks import SMALL

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
CHOSEN = TrainingOption(TrainingSetting(512, "attention", "int8"), Footprint(base_bytes=900 * MIB))
ABOVE = TrainingOption(
    TrainingSetting(512, "attention", "fp32"), Footprint(base_bytes=1100 * MIB), blocked="memory: 1,200 of 1,024"
)
TRIAL = LimitTrial("board", GIB, CHOSEN, ABOVE)


def python(text: str, limit: int | None) -> str | None:
    return run_limited([sys.executable, "-c", text], limit, dict(os.environ))


@pytest.mark.integration
@linux
def test_process_above_the_limit_is_killed() -> None:
    grows = "import time; x = bytearray(200 << 20); time.sleep(0.5); print(len(x))"
    assert python(grows, 100 * MIB) is None
    assert python(grows, 400 * MIB) == python(grows, None) == f"{200 << 20}\n"


@pytest.mark.integration
@linux
def test_other_failures_raise() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        python("1 / 0", GIB)


@pytest.mark.parametrize(
    ("peak", "above", "sound"), [(900, 1000, True), (None, 1000, False), (900, 930, True), (900, 920, False)]
)
def test_killed_plan_or_needless_refusal_is_unsound(peak: int | None, above: int, sound: bool) -> None:
    """The threshold is 921.6 MiB, nine tenths of the limit."""
    step = None if peak is None else MeasuredStep(peak * MIB, 1.0)
    row_of_device = result_row(TRIAL, {(CHOSEN, GIB): step, (ABOVE, None): MeasuredStep(above * MIB, 1.0)})
    assert row_of_device["sound"] is sound
    assert row_of_device["ran"] is (peak is not None)
    assert row_of_device["above_share"] == above / 1024


@pytest.mark.stress
def test_equal_cases_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the best option fits, there is none above it."""
    ran: list[Any] = []

    def step(case: limits.FootprintCase, folder: Path, limit: int | None) -> MeasuredStep:  # noqa: ARG001
        ran.append((case, limit))
        return MeasuredStep(300 * MIB, 1.0)

    monkeypatch.setattr(limits, "NETWORKS", SMALL)
    monkeypatch.setattr(limits, "prepare_base", lambda *_: None)
    monkeypatch.setattr(limits, "runtime_bytes", lambda: 200 * MIB)
    monkeypatch.setattr(limits, "measure_step", step)
    output = tmp_path / "limits.json"
    devices = ["pi4_4gb", "pi5_4gb", "laptop"]
    assert limits.main(["--base", "unet", "--output", str(output), "--devices", *devices]) == 0
    record = json.loads(output.read_text())
    assert [(row["device"], row["above"]) for row in record["rows"]] == [(name, None) for name in devices]
    assert len(ran) == 2
