"""Whole runs with every method of personalization, on a tiny base."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers.simulations import BARE, interrupt, results, run
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
RESUMED = ("fedalt", "population")
"""Methods whose state between rounds survives a kill; a repeated round starts from the same state."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))


@pytest.mark.integration
@pytest.mark.parametrize("method", list(PERSONALIZATIONS))
def test_run_makes_personal_adapters(method: str, pipeline_folder: Path, tmp_path: Path) -> None:
    """A run of a method with state between rounds is also killed and resumed, with the same results."""
    words = [f"personalization={method}", *OPTIONS[method], *BARE]
    whole = tmp_path / "whole"
    done = run(pipeline_folder, whole, *words)
    assert done.returncode == 0, done.stderr
    assert "changed nothing" not in done.stderr
    assert len(list((whole / "adapters" / "personal").glob("*.with_shared.safetensors"))) == 3
    summary, _, _ = results(whole)
    assert summary["loss"]["personal"] < summary["loss"]["shared"]
    if method in RESUMED:
        killed = tmp_path / "killed"
        code, _, errors = interrupt(pipeline_folder, killed, *words, line="round 2 of 3", number=signal.SIGKILL)
        assert code == -signal.SIGKILL, errors
        assert not (killed / "summary.json").exists()
        assert run(pipeline_folder, killed, *words, "resume=true").returncode == 0
        assert results(killed) == results(whole)


@pytest.mark.integration
def test_last_round_of_population_keeps_the_shared_loss(pipeline_folder: Path, tmp_path: Path) -> None:
    """The rounds before it are those of a shorter run without it."""
    options = [word for word in OPTIONS["population"] if not word.startswith("compression")]
    words = ["aggregation=fedit", "personalization=population", *options, *BARE]
    assert run(pipeline_folder, tmp_path / "longer", *words).returncode == 0
    assert run(pipeline_folder, tmp_path / "shorter", "aggregation=fedit", *BARE, "rounds=2").returncode == 0
    losses, before = ([record["shared"] for record in results(tmp_path / each)[1]] for each in ("longer", "shorter"))
    assert losses[:3] == before
    assert losses[3] == pytest.approx(losses[2], rel=1e-6)
    assert losses[2] < losses[1]
