"""The table of the cohort: what is timed is what is compared, and each claim is held to the strongest form."""

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


def test_a_client_step_is_four_examples_whatever_was_drawn() -> None:
    assert timing([1.0, 3.0, 8.0], [40, 80, 40]).milliseconds == [100.0, 150.0, 800.0]
    assert timing([1.0, 3.0, 8.0], [40, 80, 40]).median == 150.0


def test_plain_forms_meet_the_plain_cohort_and_private_ones_the_private() -> None:
    found = compare(
        {
            "peft fp32": timing([4.0], [40]),
            "opacus fp32": timing([9.0], [40]),
            "hooks": timing([6.0], [40]),
            "cohort": timing([1.0], [40]),
            "cohort DP": timing([3.0], [80]),
        },
        floors=[30.0],
    )
    assert found["faster"] == pytest.approx({"peft fp32": 4.0, "opacus fp32": 6.0, "hooks": 4.0})
    assert found["DP over plain"] == pytest.approx(1.5)
    assert (found["share"], found["share DP"]) == pytest.approx((0.3, 0.2))


def test_a_claim_is_held_to_the_fastest_way_of_a_peer() -> None:
    found = strongest({"peft autocast": 9.0, "peft fp32": 7.0, "opacus fp32": 3.0, "opacus compute": 2.0})
    assert found == {"peft fp32", "opacus compute"}


def test_every_form_trains_what_it_says() -> None:
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


def test_the_record_holds_all_repeats_and_makes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--bases", "tiny", "--peers", "hooks", "--repeats", "2", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.throughput.cohort", *words, "--out", str(tmp_path / "found.json")])
    cohort.main()
    record = json.loads((tmp_path / "found.json").read_text())
    found = record["bases"]["tiny"]
    assert record["settings"] == {
        "device": "cpu",
        "precision": "fp32",
        "repeats": 2,
        "steps": 1,
        "clients": None,
        "compiled": False,
        "memory": record["settings"]["memory"],
    }
    assert set(found["forms"]) == {"hooks", "cohort", "cohort DP"}
    assert all(len(form["seconds"]) == len(form["examples"]) == 2 for form in found["forms"].values())
    assert found["errors"] == {}
    assert "cohort DP" in capsys.readouterr().out
    assert table(record).row_count == len(found["forms"]) + 3


def test_a_form_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr("bench.throughput.step_variants.OpacusPeer", broken)
    found = cohort.measure(WORKLOADS["tiny"], SETTING, ("opacus", "hooks"))
    assert found["errors"] == {"opacus fp32": "MemoryError: none left"}
    assert set(found["forms"]) == {"hooks", "cohort", "cohort DP"}
