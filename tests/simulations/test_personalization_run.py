"""Whole runs with every method of personalization, on a tiny base."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers.simulations import BARE, command, results, run, send_signal_at
from training.personalization import PERSONALIZATIONS

OPTIONS: dict[str, list[str]] = {
    "directions": ["aggregation=fedit", "personalization.number=2", "personalization.steps=3"],
    "fedalt": ["personalization.rank=2"],
    "lora": [],
    "population": [
        "compression.download=int8",
        "personalization.number=2",
        "personalization.round_steps=3",
        "personalization.steps=3",
    ],
    "prior": [],
    "reptile": [
        "aggregation=fedit",
        "server_optimizer=fedavgm",
        "server_optimizer.lr=0.5",
        "server_optimizer.momentum=0",
    ],
}
"""Settings of each method: few pictures, and rules of aggregation that it supports."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))


@pytest.mark.integration
@pytest.mark.parametrize("method", list(PERSONALIZATIONS))
def test_run_makes_personal_adapters(method: str, pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(pipeline_folder, folder, f"personalization={method}", *OPTIONS[method], *BARE)
    assert done.returncode == 0, done.stderr
    assert "changed nothing" not in done.stderr
    assert len(list((folder / "adapters" / "personal").glob("*.with_shared.safetensors"))) == 3
    summary, _, _ = results(folder)
    assert summary["loss"]["personal"] < summary["loss"]["shared"]


@pytest.mark.integration
@pytest.mark.parametrize("method", ["fedalt", "population"])
def test_killed_and_resumed_run_gives_same_results(method: str, pipeline_folder: Path, tmp_path: Path) -> None:
    """State of a method between rounds survives, and a repeated round starts from the same one."""
    words = [f"personalization={method}", *OPTIONS[method], *BARE]
    assert run(pipeline_folder, tmp_path / "whole", *words).returncode == 0
    folder = tmp_path / "killed"
    send_signal_at(command(pipeline_folder, folder, *words), "round 2 of 3", signal.SIGKILL)
    assert not (folder / "summary.json").exists()
    assert run(pipeline_folder, folder, *words, "resume=true").returncode == 0
    assert results(folder) == results(tmp_path / "whole")
