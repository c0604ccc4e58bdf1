"""Tests of the gain kept under attack, on known numbers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bench.robustness import byzantine
from bench.robustness.byzantine import (
    CLEAN,
    LARGE,
    ROBUST,
    SEEDS,
    SMALL,
    TUNING_SEEDS,
    ByzantineCase,
    gain,
    gain_kept,
    table,
)
from bench.robustness.byzantine_clients import ATTACKS
from tests.helpers.configs import compose


def ran(gained: float, backdoor: float = 0.0, dropped: int = 0) -> dict[str, Any]:
    return {
        "base": [1.0, 3.0],
        "shared": [1.0 - gained, 3.0 - gained],
        "backdoor": backdoor,
        "dropped": [{"norm": dropped}, {}],
    }


def test_gain_kept_is_relative_to_the_clean_run() -> None:
    assert gain(ran(0.5)) == pytest.approx(0.5)
    assert gain_kept(ran(0.4), ran(0.5)) == pytest.approx(0.8)
    assert gain_kept(ran(-0.5), ran(0.5)) == pytest.approx(-1.0)


def test_worst_seed_decides() -> None:
    results = {
        (CLEAN, False): [ran(0.5), ran(1.0)],
        ("zero", False): [ran(0.3), ran(0.9)],
        ("zero", True): [ran(0.45), ran(0.8)],
        ("backdoor", True): [ran(0.45, 0.05, 3), ran(0.9, 0.2)],
    }
    output = io.StringIO()
    Console(file=output, width=160).print(table(results))
    rows = [line.split("│")[1:-1] for line in output.getvalue().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["clean", "none", "100% [100%]", "", "0% [0%]", "", "0"],
        ["zero", "none", "75% [60%]", "", "0% [0%]", "", "0"],
        ["zero", "robust", "85% [80%]", "no", "0% [0%]", "yes", "0"],
        ["backdoor", "robust", "90% [90%]", "yes", "12% [20%]", "no", "3"],
    ]


@pytest.mark.integration
def test_tuning_and_claim_use_different_data() -> None:
    assert not set(SEEDS) & set(TUNING_SEEDS)
    assert compose(" ".join([*SMALL, *ROBUST])).data.role == "development"
    large = compose(" ".join([*LARGE, *ROBUST]))
    assert (large.data.role, large.data.writers) == ("test", 60)
    assert large.robust


def test_completed_run_is_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    calls: list[str] = []
    monkeypatch.setattr(byzantine, "_run", lambda case, _: calls.append(case.name) or ran(0.5))
    for _ in range(2):
        for attack in ("sign flip", "zero"):
            case = ByzantineCase(attack=attack, protected=True, seed=3, overrides=(), samples=1, folder=str(tmp_path))
            assert byzantine.run(case) == ran(0.5)
    assert calls == ["sign-flip-protected-3", "zero-protected-3"]
    assert "sign flip" in ATTACKS


@pytest.mark.stress
def test_backdoor_runs_through_the_real_loop(tmp_path: Any) -> None:
    overrides = (*SMALL, "data.writers=5", "rounds=1", "adapter.shared.steps=1", "data.test=1")
    case = ByzantineCase(
        attack="backdoor", protected=True, seed=0, overrides=overrides, samples=1, folder=str(tmp_path)
    )
    result = byzantine.run(case)
    assert result["dropped"] == [{}]
    assert len(result["base"]) == len(result["shared"]) == 4
    assert (
        result["diagnostics"][0]["held"] >= 1
    )  # a single attacker resembles no other client and gets no larger weight
