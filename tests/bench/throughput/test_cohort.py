"""Tests of the cohort benchmark: comparisons, timed variants and the result file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.lib.workloads import BATCH, POISSON_SIZES, WORKLOADS
from bench.throughput import cohort
from bench.throughput.cohort import StepTimings, compare, strongest, table, time_repeat
from bench.throughput.step_variants import PEERS, CohortVariant, PeerVariant, TimingSettings, step_variants

CPU = torch.device("cpu")
SETTING = TimingSettings(device=CPU, precision="fp32", repeats=1, steps=2, clients=3, memory=2**30, compiled=False)


def timing(seconds: list[float], examples: list[int]) -> StepTimings:
    return StepTimings(10, 1.0, seconds, examples)


def test_client_step_is_four_examples() -> None:
    assert timing([1.0, 3.0, 8.0], [40, 80, 40]).milliseconds == [100.0, 150.0, 800.0]
    assert timing([1.0, 3.0, 8.0], [40, 80, 40]).median == 150.0


def test_variants_are_compared_with_their_cohort() -> None:
    comparison = compare(
        {
            "peft fp32": timing([4.0], [40]),
            "opacus fp32": timing([9.0], [40]),
            "hooks": timing([6.0], [40]),
            "cohort": timing([1.0], [40]),
            "cohort DP": timing([3.0], [80]),
        },
        floors=[30.0],
    )
    assert comparison["faster"] == pytest.approx({"peft fp32": 4.0, "opacus fp32": 6.0, "hooks": 4.0})
    assert comparison["DP over plain"] == pytest.approx(1.5)
    assert (comparison["share"], comparison["share DP"]) == pytest.approx((0.3, 0.2))


def test_fastest_variant_of_each_peer_counts() -> None:
    fastest = strongest({"peft autocast": 9.0, "peft fp32": 7.0, "opacus fp32": 3.0, "opacus compute": 2.0})
    assert fastest == {"peft fp32", "opacus compute"}


@pytest.mark.integration
def test_every_variant_trains_its_examples() -> None:
    names = []
    for group in step_variants(WORKLOADS["tiny"], SETTING, PEERS):
        for name, make in group.items():
            form = make()
            _, seen = time_repeat(form, CPU)
            names.append(name)
            match form:
                case PeerVariant():
                    assert seen == BATCH * form.client_steps == BATCH * len(POISSON_SIZES)
                case CohortVariant(private=False):
                    assert seen == BATCH * form.client_steps == BATCH * 3 * SETTING.steps
                case CohortVariant():
                    assert 0 < seen < 3 * BATCH * form.client_steps
                    assert seen == sum(source.drawn for source in form.noise)
    assert names == ["peft fp32", "opacus fp32", "hooks", "cohort", "cohort DP", "one"]


@pytest.mark.integration
def test_record_holds_all_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--bases", "tiny", "--peers", "hooks", "--repeats", "2", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.throughput.cohort", *words, "--out", str(tmp_path / "found.json")])
    cohort.main()
    record = json.loads((tmp_path / "found.json").read_text())
    results = record["bases"]["tiny"]
    assert record["settings"] == {
        "device": "cpu",
        "precision": "fp32",
        "repeats": 2,
        "steps": 1,
        "clients": None,
        "compiled": False,
        "memory": record["settings"]["memory"],
    }
    assert set(results["forms"]) == {"hooks", "cohort", "cohort DP"}
    assert all(len(form["seconds"]) == len(form["examples"]) == 2 for form in results["forms"].values())
    assert results["errors"] == {}
    assert "cohort DP" in capsys.readouterr().out
    assert table(record).row_count == len(results["forms"]) + 3


@pytest.mark.integration
def test_failed_variant_affects_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr("bench.throughput.step_variants.OpacusPeer", broken)
    results = cohort.measure(WORKLOADS["tiny"], SETTING, ("opacus", "hooks"))
    assert results["errors"] == {"opacus fp32": "MemoryError: none left"}
    assert set(results["forms"]) == {"hooks", "cohort", "cohort DP"}
