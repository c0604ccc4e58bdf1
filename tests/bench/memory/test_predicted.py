"""Tests of the predicted cases and of the bounds on their errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.memory import predicted
from bench.memory.predicted import MeasuredStep
from common.units import MIB
from conf.schemas.planning import compose_plan
from models.footprint.footprint import Footprint
from tests.helpers.networks import SMALL
from tests.helpers.samples import sampled

# 200 MiB, and one second at 10 GFLOP/s
PREDICTED = Footprint(
    base_bytes=100 * MIB,
    activations_bytes=50 * MIB,
    workspace_bytes=10 * MIB,
    adapter_bytes=40 * MIB,
    matrix_operations=10**10,
)
DEVICE = replace(compose_plan(["device=laptop"], Path()).device, matrix_gflops=10.0)
RUNTIME = 300
NAME = "unet-142M 512² fp32 none"


def test_cases_cover_families_and_precisions() -> None:
    assert len(predicted.CASES) >= 24
    assert len({case.base.family.name for case in predicted.CASES}) >= 5
    assert {case.weights for case in predicted.CASES} == {"fp32", "int8", "mixed", "nf4"}
    assert len(predicted.KNOWN_CASES) == len(predicted.CASES) + len(predicted.FULL) + 1
    assert predicted.RUNTIME.network not in {case.network for case in predicted.CASES}  # the runtime is fitted on it


@pytest.mark.parametrize(
    ("measured", "seconds", "status"),
    [(500, 1.0, 0), (526, 1.0, 0), (527, 1.0, 1), (455, 1.0, 0), (454, 1.0, 1), (500, 0.79, 1), (500, 1.34, 1)],
)
def test_prediction_out_of_bounds_fails(
    measured: int,
    seconds: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The prediction is 500 MiB and one second."""
    monkeypatch.setattr(predicted, "predict", lambda _: PREDICTED)

    def measure(cases: Sequence[predicted.FootprintCase]) -> Iterator[tuple[predicted.FootprintCase, MeasuredStep]]:
        for case in cases:
            yield case, MeasuredStep((RUNTIME + 200 if case is predicted.RUNTIME else measured) * MIB, seconds)

    monkeypatch.setattr(predicted, "measure_in_processes", measure)
    monkeypatch.setattr(predicted, "run_child", lambda _: json.dumps(asdict(DEVICE)))
    output = tmp_path / "predicted.json"
    assert predicted.main(["--only", NAME, "--output", str(output)]) == status
    record = json.loads(output.read_text())
    assert record["within_bounds"] is (status == 0)
    assert record["runtime_bytes"] == RUNTIME * MIB
    (row,) = record["rows"]
    assert row["error"] == pytest.approx(500 / measured - 1)
    assert row["net_error"] == pytest.approx(200 / (measured - RUNTIME) - 1)
    assert row["seconds_error"] == pytest.approx(1 / seconds - 1)
    output = capsys.readouterr().out
    assert NAME in output
    assert f"{measured}" in output


def test_earlier_measurements_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only new cases are measured in a process."""
    monkeypatch.setattr(predicted, "predict", lambda _: PREDICTED)
    first, second = predicted.CASES[:2]
    earlier, output = tmp_path / "earlier.json", tmp_path / "again.json"
    row = {"case": first.name, "measured_bytes": 510 * MIB, "measured_seconds": 1.1}
    known = {"runtime_measured": ((RUNTIME + 200) * MIB, 0.5), "device": asdict(DEVICE)}
    earlier.write_text(json.dumps({**known, "rows": [row]}))
    measured_cases: list[predicted.FootprintCase] = []

    def measure(cases: Sequence[predicted.FootprintCase]) -> Iterator[tuple[predicted.FootprintCase, MeasuredStep]]:
        measured_cases.extend(cases)
        yield from ((case, MeasuredStep(505 * MIB, 0.9)) for case in cases)

    monkeypatch.setattr(predicted, "measure_in_processes", measure)
    words = ["--only", first.name, second.name, "--measured", str(earlier), "--output", str(output)]
    assert predicted.main(words) == 0
    assert measured_cases == [second]
    peaks = {row["case"]: row["measured_bytes"] for row in json.loads(output.read_text())["rows"]}
    assert peaks == {first.name: 510 * MIB, second.name: 505 * MIB}


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read as Linux tells them")
@pytest.mark.parametrize("kind", sampled(["unet", "flux"], ["unet"]))
def test_real_step_is_measured(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has more memory than the step."""
    monkeypatch.setattr(predicted, "NETWORKS", SMALL)
    case = predicted.FootprintCase(kind, 128, "int8", "block", batch=2)
    predicted.prepare(kind, tmp_path, ["int8"])
    step = predicted.measure_case(case, tmp_path)
    assert step.peak_bytes > predicted.predict(case).peak_bytes
    assert step.seconds > 0
