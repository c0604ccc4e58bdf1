"""`anther device plan` on the tiny pipeline: feasible plans and one-line errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.cli import plan
from client.planning.plan_search import TrainingSetting
from conf.schemas.planning import compose_plan
from models.diffusion.denoiser import Denoiser
from models.families.known import KNOWN_BASES
from models.footprint.footprint import MARGIN, Footprint, footprint, resident_bytes

RUNTIME = compose_plan(["device=pi4_2gb"], Path("/nowhere")).device.runtime_mib


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of the tiny pipeline, computed once for all tests."""
    monkeypatch.setattr(plan, "footprint", lambda base, *shapes, **how: _once(base, shapes, how))


KEPT: dict[object, Footprint] = {}


def _once(base: Denoiser, shapes: tuple[torch.Size, ...], how: dict[str, int]) -> Footprint:
    key = (resident_bytes(base), len(base.sites), shapes, how["batch"], how["rank"])
    if key not in KEPT:
        KEPT[key] = footprint(base, *shapes, **(how | {"runtime_bytes": 0}))
    return replace(KEPT[key], runtime_bytes=how["runtime_bytes"])


def rungs(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert plan.main([*words, "--json"]) == 0
    values: dict = json.loads(capsys.readouterr().out)
    return values


@pytest.mark.integration
def test_plan_of_small_base(pipeline_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"base={pipeline_folder}", "device=pi4_2gb", "alternatives=0", "rank=2"]
    assert plan.main(words) == 0
    shown = capsys.readouterr().out
    assert "pi4_2gb: 1.6 GiB, rank 2, 1 picture a step" in shown
    assert "▸" in shown
    assert "MiB of ▸: base " in shown
    assert max(map(len, shown.splitlines()[1:])) <= plan.WIDTH
    result = rungs(capsys, *words)
    assert result["best"] == 0
    selected = result["rungs"][0]
    assert selected["blocked"] is None
    assert selected["setting"] == {
        "resolution": 16,
        "sites": "attention",
        "weights": "fp32",
        "checkpointing": "none",
        "batch": 1,
    }
    parts = selected["footprint"]
    assert selected["peak_bytes"] == sum(
        parts[name] for name in parts if name.endswith("_bytes") and name != "moved_bytes"
    )
    assert parts["runtime_bytes"] == RUNTIME * 2**20


@pytest.mark.integration
def test_less_memory_gives_leaner_plan(
    pipeline_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [TrainingSetting(16, "attention", "fp32", "none"), TrainingSetting(16, "cross", "int8", "none")]
    monkeypatch.setattr(plan, "training_settings", lambda *_: some)
    words = [f"base={pipeline_folder}", "device=pi4_2gb", "device.runtime_mib=200", "rank=2"]
    first, second = rungs(capsys, *words)["rungs"]
    assert second["peak_bytes"] < first["peak_bytes"]
    between = (first["peak_bytes"] + second["peak_bytes"]) / 2 * MARGIN / 2**30
    assert rungs(capsys, *words, f"device.memory_gib={between}")["best"] == 1
    assert plan.main([*words, "device.memory_gib=0.15"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing fits" in shown
    assert shown.count("of 154") == 2


@pytest.mark.integration
def test_no_pass_of_too_large_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL in float32 takes 10 GB."""
    monkeypatch.setattr(plan, "footprint", None)
    expected = compose_plan(["device=pi4_2gb"], Path("/nowhere"))
    predicted = plan.predictor(KNOWN_BASES["sdxl"], expected)(TrainingSetting(1024, "cross", "fp32", "none"))
    parameters = sum(parameter.numel() for parameter in KNOWN_BASES["sdxl"].network().parameters())
    assert predicted == Footprint(base_bytes=4 * parameters, runtime_bytes=predicted.runtime_bytes)
    assert predicted.runtime_bytes == expected.device.runtime_mib * 2**20


def test_plan_for_this_device(pipeline_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = Path(plan.__file__).parents[2] / "conf" / "device" / "pixel8.yaml"
    (home / plan.PROFILE).write_text(profile.read_text().replace("name: pixel8", "name: mine"))
    result = rungs(capsys, f"base={pipeline_folder}", "alternatives=0", "rank=2")
    assert result["plan"]["device"]["name"] == "mine"
    assert result["rungs"][result["best"]]["battery_share"] >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: device=this: not measured yet"),
        (["device=pixel8", "base=sd16"], "error: sd16: no such folder"),
        (["device=pixel8", "rank=-1"], "error: rank=-1: must be 1 or more"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(words) == plan.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_resolutions_fit_the_network() -> None:
    def sides(name: str) -> list[int]:
        return list(dict.fromkeys(setting.resolution for setting in plan.training_settings(KNOWN_BASES[name])))

    assert sides("sd15") == [512, 384, 256]
    assert sides("sdxl") == [1024, 768, 512, 256]
    assert sides("sd21") == [768, 576, 384]
    assert TrainingSetting(1024, "cross", "fp32", "none") in plan.training_settings(KNOWN_BASES["pixart-sigma"])
    assert {setting.sites for setting in plan.training_settings(KNOWN_BASES["flux-dev"])} == {"attention"}


@pytest.mark.parametrize(
    ("base", "sites", "expected"),
    [
        ("sd15", None, ["attention", "cross"]),
        ("sd15", "linear", ["linear", "attention", "cross"]),
        ("sd15", "all", ["all", "linear", "attention", "cross"]),
        ("sd15", ".*to_q", [".*to_q"]),
        ("flux-dev", "linear", ["linear", "attention"]),
    ],
)
def test_smaller_sets_of_sites_are_tried(base: str, sites: str | None, expected: list[str]) -> None:
    settings = plan.training_settings(KNOWN_BASES[base], sites)
    assert list(dict.fromkeys(setting.sites for setting in settings)) == expected


@pytest.mark.integration
def test_plan_of_named_sites(pipeline_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"base={pipeline_folder}", "device=pi4_2gb", "rank=2")
    adapters = {}
    for sites in ("attention", "linear", "all", "null"):
        result = rungs(capsys, *words, f"sites={sites}")
        first = result["rungs"][0]
        assert first["setting"]["sites"] == sites.replace("null", "attention")
        adapters[sites] = first["footprint"]["adapter_bytes"]
    assert adapters["attention"] == adapters["null"] < adapters["linear"] < adapters["all"]


@pytest.mark.parametrize(
    ("count", "best", "around", "expected"),
    [(9, 4, 2, [2, 3, 4, 5, 6]), (9, 0, 2, [0, 1, 2]), (3, 2, 5, [0, 1, 2]), (9, None, 2, [7, 8]), (1, 0, 0, [0])],
)
def test_options_around_best_are_displayed(count: int, best: int | None, around: int, expected: list[int]) -> None:
    assert list(plan.displayed(count, best, around)) == expected
