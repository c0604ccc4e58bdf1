"""Predictions against measurements: enough of them, each by its own name, and a bound that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import predicted
from models.footprint import Footprint
from tests.models.networks import SMALL

MIB = predicted.MIB
PREDICTED = Footprint(100 * MIB, 50 * MIB, 10 * MIB, 10 * MIB, 30 * MIB, 0, 1, 1, 1)  # 200 MiB
RUNTIME = 300


def test_there_are_enough_cases_of_enough_families() -> None:
    assert len(predicted.CASES) >= 24
    assert len({case.architecture.kind for case in predicted.CASES}) >= 5
    assert len(predicted.KNOWN) == len(predicted.CASES) + len(predicted.FULL) + 1
    assert predicted.RUNTIME not in predicted.CASES  # what is fitted on isn't judged by


@pytest.mark.parametrize(("measured", "status"), [(500, 0), (526, 0), (527, 1), (455, 0), (454, 1)])
def test_a_prediction_out_of_bounds_fails(
    measured: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 MiB are predicted in all."""
    monkeypatch.setattr(predicted, "predicted", lambda _: PREDICTED)

    def told(case: predicted.Case) -> int:
        return (RUNTIME + 200 if case is predicted.RUNTIME else measured) * MIB

    monkeypatch.setattr(predicted, "in_fresh_process", told)
    output = tmp_path / "predicted.json"
    assert predicted.main(["--only", "unet-142M 256² fp32 none", "--output", str(output)]) == status
    record = json.loads(output.read_text())
    assert record["within_bounds"] is (status == 0)
    assert record["runtime_bytes"] == RUNTIME * MIB
    (row,) = record["rows"]
    assert row["error"] == pytest.approx(500 / measured - 1)
    assert row["net_error"] == pytest.approx(200 / (measured - RUNTIME) - 1)
    shown = capsys.readouterr().out
    assert "unet-142M 256² fp32 none" in shown
    assert f"{measured}" in shown


def test_what_was_measured_once_is_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process for it; of a case that is new there is one."""
    monkeypatch.setattr(predicted, "predicted", lambda _: PREDICTED)
    first, second = predicted.CASES[:2]
    earlier, output = tmp_path / "earlier.json", tmp_path / "again.json"
    row = {"case": first.name, "measured_bytes": 510 * MIB}
    earlier.write_text(json.dumps({"runtime_peak_bytes": (RUNTIME + 200) * MIB, "rows": [row]}))
    asked: list[predicted.Case] = []

    def told(case: predicted.Case) -> int:
        asked.append(case)
        return 505 * MIB

    monkeypatch.setattr(predicted, "in_fresh_process", told)
    words = ["--only", first.name, second.name, "--measured", str(earlier), "--output", str(output)]
    assert predicted.main(words) == 0
    assert asked == [second]
    found = {row["case"]: row["measured_bytes"] for row in json.loads(output.read_text())["rows"]}
    assert found == {first.name: 510 * MIB, second.name: 505 * MIB}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read as Linux tells them")
@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_a_real_step_is_measured(kind: str) -> None:
    """In this process, which holds much beside it."""
    case = predicted.Case(SMALL[kind], 128, "int8", "block", batch=2)
    assert predicted.measured(case) > predicted.predicted(case).peak_bytes
