"""Tests of the gain kept under privacy, on known numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bench.quality.utility import (
    DEVELOPMENT,
    FORMS,
    TEST,
    WriterCohort,
    command,
    gain_kept,
    parameters,
    table,
    tuning_epsilon,
)
from privacy.accounting import noise_multiplier_for


def ran(gain: float, writers: int = 40, spread: float = 0.0) -> dict[str, Any]:
    """Make a run whose losses fall from 1 by `gain` ± `spread`, and by twice that with the personal adapter."""
    gains = gain + spread * np.linspace(-1, 1, writers)
    losses = {"base": [1.0] * writers, "shared": list(1 - gains), "personal": list(1 - 2 * gains)}
    promise = {"value": 7.99, "delta": 1e-3, "unit": "image", "relation": "add_or_remove_one"}
    return {"losses": losses, "epsilon": promise, "device_epsilon": None, "parameters": 3584}


def test_gain_kept_is_relative_to_the_reference() -> None:
    share, low, high = gain_kept(ran(0.3, spread=0.1), ran(0.5, spread=0.2), "shared")
    assert share == pytest.approx(0.6)
    spread = 0.1 * np.linspace(-1, 1, 40)
    half = 1.96 * spread.std(ddof=1) / 40**0.5 / 0.5
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.02)
    assert gain_kept(ran(0.3), ran(0.5), "personal")[0] == pytest.approx(1.2)


def test_table_shows_every_run_and_its_target() -> None:
    results = {
        (TEST, 0): {"reference": ran(0.5), "example-8": ran(0.3)},
        (WriterCohort(50, 20), 0): {"example-8": ran(0.1)},
    }
    results[WriterCohort(50, 20), 0]["reference"] = ran(0.4)
    output = io.StringIO()
    Console(file=output, width=160).print(table(results))
    rows = [line.split("│")[1:-1] for line in output.getvalue().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:5] for row in cells] == [
        ["200", "20", "reference", "0", "3,584"],
        ["50", "20", "reference", "0", "3,584"],
        ["200", "20", "example-8", "0", "3,584"],
        ["50", "20", "example-8", "0", "3,584"],
    ]
    assert [row[7][:3] for row in cells] == ["100", "100", "60%", "25%"]
    assert [row[8] for row in cells] == ["", "", "60%", ""]


@pytest.mark.integration
def test_tuning_noise_equals_test_noise() -> None:
    """The mean of devices' noised sums has noise σ / √devices, the server's noised sum σ / devices."""
    form = FORMS["device-8"]
    few = DEVELOPMENT.writers / TEST.writers
    tuning = noise_multiplier_for(epsilon=tuning_epsilon(form), delta=1e-3, sampling_rate=1.0, steps=10)
    expected = noise_multiplier_for(epsilon=8.0, delta=1e-3, sampling_rate=1.0, steps=10) * few
    assert tuning == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", FORMS)
def test_test_runs_keep_their_epsilon(name: str) -> None:
    output = command(FORMS[name], 3, TEST, tune=False, overrides=["rounds=2"])
    assert {"data.role=test", "data.writers=200", "seed=3", f"privacy={FORMS[name].level}"} <= set(output)
    assert output[-1] == "rounds=2"
    if FORMS[name].epsilon:
        assert f"privacy.epsilon={FORMS[name].epsilon}" in output


def test_cores_have_rank_squared_parameters(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    factors = {"unet.one.lora_A.weight": torch.zeros(4, 10), "unet.one.lora_B.weight": torch.zeros(20, 4)}
    save_file(factors, tmp_path / "adapters" / "shared.safetensors")
    assert parameters(tmp_path, cores=False) == 4 * (10 + 20)
    assert parameters(tmp_path, cores=True) == 4 * 4
