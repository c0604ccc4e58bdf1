"""What privacy leaves of a gain, from numbers that are known."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bench.privacy.utility import (
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
    """A run in which everybody's loss fell from 1 by so much, more or less, and by twice that with the personal one."""
    gains = gain + spread * np.linspace(-1, 1, writers)
    losses = {"base": [1.0] * writers, "shared": list(1 - gains), "personal": list(1 - 2 * gains)}
    promise = {"value": 7.99, "delta": 1e-3, "unit": "image", "relation": "add_or_remove_one"}
    return {"losses": losses, "epsilon": promise, "device_epsilon": None, "parameters": 3584}


def test_what_is_kept_is_a_share_of_the_references_gain() -> None:
    share, low, high = gain_kept(ran(0.3, spread=0.1), ran(0.5, spread=0.2), "shared")
    assert share == pytest.approx(0.6)
    spread = 0.1 * np.linspace(-1, 1, 40)
    half = 1.96 * spread.std(ddof=1) / 40**0.5 / 0.5
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.02)
    assert gain_kept(ran(0.3), ran(0.5), "personal")[0] == pytest.approx(1.2)


def test_the_table_has_every_run_and_its_target() -> None:
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


def test_few_writers_see_the_noise_of_many() -> None:
    """σ / √devices is the noise on a mean of devices' sums, σ / devices that of the server's."""
    form = FORMS["device-8"]
    few = DEVELOPMENT.writers / TEST.writers
    found = noise_multiplier_for(epsilon=tuning_epsilon(form), delta=1e-3, sampling_rate=1.0, steps=10)
    wanted = noise_multiplier_for(epsilon=8.0, delta=1e-3, sampling_rate=1.0, steps=10) * few
    assert found == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("name", FORMS)
def test_only_tuning_leaves_the_promise(name: str) -> None:
    output = command(FORMS[name], 3, TEST, tune=False, overrides=["rounds=2"])
    assert {"data.role=test", "data.writers=200", "seed=3", f"privacy={FORMS[name].level}"} <= set(output)
    assert output[-1] == "rounds=2"
    if FORMS[name].epsilon:
        assert f"privacy.epsilon={FORMS[name].epsilon}" in output


def test_a_core_is_all_that_is_trained_of_a_site(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    factors = {"unet.one.lora_A.weight": torch.zeros(4, 10), "unet.one.lora_B.weight": torch.zeros(20, 4)}
    save_file(factors, tmp_path / "adapters" / "shared.safetensors")
    assert parameters(tmp_path, cores=False) == 4 * (10 + 20)
    assert parameters(tmp_path, cores=True) == 4 * 4
