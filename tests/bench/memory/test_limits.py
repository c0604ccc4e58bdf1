"""A limit that ends what exceeds it, and a verdict that can go either way."""

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


@linux
def test_what_holds_more_than_the_limit_is_ended() -> None:
    grows = "import time; x = bytearray(200 << 20); time.sleep(0.5); print(len(x))"
    assert python(grows, 100 * MIB) is None
    assert python(grows, 400 * MIB) == python(grows, None) == f"{200 << 20}\n"


@linux
def test_what_fails_otherwise_is_no_verdict() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        python("1 / 0", GIB)


@pytest.mark.parametrize(
    ("peak", "above", "sound"), [(900, 1000, True), (None, 1000, False), (900, 930, True), (900, 920, False)]
)
def test_a_plan_that_is_ended_or_a_timid_ladder_is_not_sound(peak: int | None, above: int, sound: bool) -> None:
    """920 MiB are nine tenths of the limit, and a little less."""
    chosen = None if peak is None else MeasuredStep(peak * MIB, 1.0)
    found = result_row(TRIAL, {(CHOSEN, GIB): chosen, (ABOVE, None): MeasuredStep(above * MIB, 1.0)})
    assert found["sound"] is sound
    assert found["ran"] is (peak is not None)
    assert found["above_share"] == above / 1024


@pytest.mark.slow
def test_every_device_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are alike run once; where the top rung fits there is none above."""
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
    assert [(each["device"], each["above"]) for each in record["rows"]] == [(name, None) for name in devices]
    assert len(ran) == 2
