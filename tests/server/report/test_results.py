"""Results of a run of real devices: adapter, summary and page."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.base.base import Base
from models.lora.adapter import Factors
from privacy.accounting import Guarantee
from server.report.results import USAGE, main, write_results
from server.report.snippet import loading_snippet
from server.rounds.state import Round, RunState
from server.supervisor.run_dirs import run_folder, save_command
from strategies.round.metrics import TrainMetrics, ValidationMetrics, zero_metrics
from tests.helpers.configs import compose
from tests.server.report.test_page import Page

GUARANTEE = Guarantee(value=1.5, delta=1e-3, strict=2.5)


def state(base: Base, *, guarantees: tuple[Guarantee, ...] = (), shared: float | None = 0.25) -> RunState:
    """Return a state after two rounds of two devices; one of them only evaluated."""
    adapter = {
        name: Factors(torch.ones(2, site.inputs), torch.ones(site.outputs, 2)) for name, site in base.sites.items()
    }
    run_state = RunState.start(run="r", private=False, adapter=adapter)
    unmeasured = ValidationMetrics(base=None, shared=None)
    run_state = run_state.after(Round(number=0, train=None, validation=unmeasured, wall_seconds=1), adapter)
    trained = replace(zero_metrics(), rank=2, steps=4, bytes_up=10, bytes_down=20, rounds=1)
    train = TrainMetrics(
        asked=2,
        replied=1,
        dropped={"no reply": 1},
        bytes_down=20,
        bytes_up=10,
        seconds=2.0,
        joules=3.0,
        loss=None,
        epsilon=None,
        guarantees=guarantees,
        devices={"pi": trained, "phone": zero_metrics()},
    )
    validation = unmeasured if shared is None else ValidationMetrics(base=0.5, shared=shared)
    return run_state.after(Round(number=1, train=train, validation=validation, wall_seconds=3), adapter)


@pytest.mark.integration
@pytest.mark.parametrize("test", [False, True])
def test_writes_adapter_summary_and_page(base: Base, tmp_path: Path, test: bool) -> None:
    page = write_results(
        compose(""), tmp_path, base, state(base, guarantees=(GUARANTEE,)), arguments="rounds=1", test=test
    )
    assert len(load_file(tmp_path / "adapters" / "shared.safetensors")) == 2 * len(base.sites)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rounds"], summary["clients"], summary["seconds"], summary["test"]) == (1, 1, 4, test)
    assert summary["loss"] == {"base": 0.5, "shared": 0.25}
    assert summary["bytes"] == {"up": 10, "down": 20}
    text = Page(page.read_text()).text
    assert "1 device trained together" in text
    assert "ε = 1.5 per image, δ = 0.001, add or remove one; ε = 2.5 at δ = 1.00e-05" in text
    assert ("so not a release" in text) == test
    assert "anther serve rounds=1" in text
    assert "adapters/shared.safetensors" in text
    assert "1 no reply" in text


@pytest.mark.integration
def test_run_without_validation(base: Base, tmp_path: Path) -> None:
    page = write_results(compose(""), tmp_path, base, state(base, shared=None), arguments="", test=False)
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] == {}
    text = Page(page.read_text()).text
    assert "Held-out pictures" not in text
    assert "No differential privacy" in text


def test_snippet_silences_libraries(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a pipeline warns about packages that it doesn't need."""
    import diffusers
    from transformers.utils import logging as transformers_logging

    verbosity = {}

    class Recorder:
        def __getattr__(self, name: str) -> object:
            verbosity[name] = transformers_logging.get_verbosity()
            return getattr(diffusers, name)

    monkeypatch.setitem(sys.modules, "diffusers", Recorder())
    loading_snippet(base, tmp_path)
    assert verbosity[base.family.pipeline] == logging.ERROR


@pytest.mark.parametrize("rate", [True, False])
def test_secret_sample_is_not_revealed(base: Base, tmp_path: Path, rate: bool) -> None:
    """Costs of single devices and rounds would reveal participation."""
    sampled = "cohort.sampling_rate=0.3" if rate else "cohort.size=2"
    config = compose(f"privacy=device aggregation=fedit data.devices=100 data.writers=1 {sampled}")
    seen = replace(GUARANTEE, unit="device", seen=9.25)
    run_state = state(base, guarantees=(seen,), shared=None)
    page = write_results(config, tmp_path, base, run_state, arguments="", test=False).read_text()
    text, summary = Page(page).text, (tmp_path / "summary.json").read_text()
    shown = [name for name in ("pi", "phone") if f'class="text">{name}</th>' in page or f'"{name}"' in summary]
    assert shown == ([] if rate else ["pi", "phone"])
    assert ("Each device was asked with a secret probability" in text) == rate
    assert ("Bytes so far" in text) != rate
    assert "ε = 9.25 if the network sees who was asked" in text
    assert json.loads(summary)["device_epsilon"]["seen"] == 9.25
    assert json.loads(summary)["bytes"] == {"up": 10, "down": 20}


def test_page_shows_the_command(base: Base, tmp_path: Path) -> None:
    save_command(tmp_path, "anther serve rounds=1 server.port=9999")
    page = write_results(compose(""), tmp_path, base, state(base), arguments="rounds=1 data.writers=1", test=False)
    assert "anther serve rounds=1 server.port=9999" in Page(page.read_text()).text


def test_empty_run_has_no_charts(base: Base, tmp_path: Path) -> None:
    run_state = state(base, shared=None)
    train = replace(run_state.history[1].train, seconds=0.0, joules=0.0, bytes_up=0, bytes_down=0)
    empty = replace(run_state, history=(run_state.history[0], replace(run_state.history[1], train=train)))
    text = Page(write_results(compose(""), tmp_path, base, empty, arguments="", test=False).read_text()).text
    assert "-1 s" not in text
    assert "Device time so far" not in text


def test_missing_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    assert main([]) == USAGE
    assert "contains no run yet" in capsys.readouterr().err
    assert main([str(tmp_path)]) == USAGE
    assert "contains no run (" in capsys.readouterr().err
    folder = run_folder("rounds=1", tmp_path / "runs")
    assert main([]) == USAGE
    assert f"{folder}: no round of this run is complete yet" in capsys.readouterr().err
