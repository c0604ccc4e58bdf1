"""Tests of the gain kept on a quantized base, on known numbers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.quality import quantization


def ran(base: float, shared: float, personal: float) -> dict[str, list[float]]:
    """Make a run of three writers with equal losses."""
    return {"base": [base] * 3, "shared": [shared] * 3, "personal": [personal] * 3}


def test_quantization_loss_reduces_the_gain() -> None:
    exact, coarse = ran(1.0, 0.8, 0.6), ran(1.1, 0.85, 0.7)
    assert quantization.gain_kept(coarse, exact, "shared") == pytest.approx((0.75, 0.75, 0.75))
    assert quantization.gain_kept(coarse, exact, "personal") == pytest.approx((0.75, 0.75, 0.75))
    assert quantization.gain_kept(exact, exact, "shared")[0] == 1.0


def test_modes_are_compared_within_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], folder: Path) -> dict[str, Any]:
        commands.append(command)
        fine, seed = folder.name.startswith("fp32"), int(folder.name[-1])
        return {"losses": ran(1.0 + seed, (0.8 if fine else 0.9) + seed, 0.6 + seed)}

    monkeypatch.setattr(quantization, "run", run)
    out = tmp_path / "quality.json"
    options = ["--seeds", "0", "1", "--modes", "int8", "--runs", str(tmp_path), "--out", str(out), "rounds=2"]
    monkeypatch.setattr(sys, "argv", ["quality", *options])
    quantization.main()
    assert len(commands) == 4
    assert all({"privacy=none", "rounds=2"} <= set(command) for command in commands)
    results = json.loads(out.read_text())["results"]
    assert [result["seed"] for result in results] == [0, 1]
    assert all(result["kept"]["int8"]["shared"][0] == pytest.approx(0.5) for result in results)
    output = io.StringIO()
    Console(file=output, width=120).print(
        quantization.table({0: {"fp32": ran(1.0, 0.8, 0.6), "nf4": ran(1.1, 0.85, 0.7)}})
    )
    assert "75.0% [75%, 75%]" in output.getvalue()
    assert "85%" in output.getvalue()
