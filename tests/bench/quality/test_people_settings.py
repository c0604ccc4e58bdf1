"""Tests of the settings file, and of the steps that are counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.quality.people_settings import (
    DEFAULT,
    LocalSettings,
    PeopleSettings,
    device_steps,
    load_settings,
    save_settings,
    with_steps,
)
from common.errors import AntherError
from conf.components import ComponentConfig

SETTINGS = PeopleSettings(
    federation=("rounds=3",),
    by_letters={"2": ("adapter.personal.lr=0.001",), "5": ("adapter.personal.lr=0.002",)},
    local={"1": LocalSettings(rank=4), "5": LocalSettings(sites="all", prior=0.3, validated=True)},
    private={"example-8": ("privacy=example",)},
)


def federation(rounds: int = 20, personal: int = 50, size: int | None = None, method: str = "", **options: int) -> Any:
    adapter = SimpleNamespace(shared=SimpleNamespace(steps=5), personal=SimpleNamespace(steps=personal))
    chosen = ComponentConfig(method or ("directions" if options else "lora"), options)
    return SimpleNamespace(rounds=rounds, adapter=adapter, cohort=SimpleNamespace(size=size), personalization=chosen)


@pytest.mark.parametrize("settings", [SETTINGS, DEFAULT])
def test_settings_round_trip(settings: PeopleSettings, tmp_path: Path) -> None:
    save_settings(tmp_path / "settings.json", settings, {"command": "anther bench people tune"})
    assert load_settings(tmp_path / "settings.json") == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no settings of people"),
        ('{"settings": {"federation": []}}', "missing"),
        ('{"other": 1}', "'settings'"),
    ],
)
def test_damaged_settings_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(AntherError, match=message) as error:
        load_settings(tmp_path / "settings.json")
    assert "anther bench people tune" in str(error.value)


def test_field_of_a_wrong_type_is_named(tmp_path: Path) -> None:
    save_settings(tmp_path / "settings.json", SETTINGS, {})
    content = json.loads((tmp_path / "settings.json").read_text())
    content["settings"]["local"]["5"]["rank"] = "8"
    (tmp_path / "settings.json").write_text(json.dumps(content))
    with pytest.raises(AntherError, match=r"local\.5\.rank: must be int, is str"):
        load_settings(tmp_path / "settings.json")


@pytest.mark.parametrize(("letters", "rate", "rank"), [(1, 0.001, 4), (2, 0.001, 4), (5, 0.002, 16), (20, 0.002, 16)])
def test_nearest_number_of_letters_is_used(letters: int, rate: float, rank: int) -> None:
    expected = ["rounds=3", f"adapter.personal.lr={rate}", f"data.train={letters}"]
    assert SETTINGS.overrides(letters) == expected
    assert SETTINGS.local_for(letters).rank == rank


def test_every_step_of_a_device_is_counted() -> None:
    assert device_steps(federation(), 240) == (100, 50)
    assert device_steps(federation(size=60), 240) == (25, 50)  # a device is asked in a quarter of the rounds
    assert device_steps(federation(round_steps=3, steps=10), 240) == (20 * 8, 60)
    assert device_steps(federation(round_steps=3, warmup=6, steps=10), 240) == (6 * 5 + 14 * 8, 60)
    assert device_steps(federation(method="prior"), 240) == (100, 100)
    assert device_steps(federation(method="population", round_steps=30, steps=10), 240) == (19 * 5 + 30, 60)
    assert device_steps(federation(method="population", size=60, round_steps=30, steps=10), 240) == (125 / 4, 60)


@pytest.mark.parametrize("total", [10, 20, 75, 120, 149])
def test_federation_is_scaled_to_a_number_of_steps(total: int) -> None:
    words = dict(word.split("=") for word in with_steps(federation(), 240, total))
    rounds, personal = int(words["rounds"]), int(words["adapter.personal.steps"])
    assert 5 * rounds + personal == total
    assert rounds == pytest.approx(20 * total / 150, abs=1)


@pytest.mark.parametrize(("total", "fitted"), [(75, 5), (150, 10), (12, 1), (8, 1)])
def test_steps_of_a_method_are_scaled(total: int, fitted: int) -> None:
    words = with_steps(federation(round_steps=1, steps=10, personal=20), 240, total)
    values = {key: int(value) for key, _, value in (word.partition("=") for word in words)}
    assert 6 * values["rounds"] + sum(values.values()) - values["rounds"] == total
    assert values["personalization.steps"] == fitted


@pytest.mark.parametrize("total", [40, 75, 120])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prior", {}),
        ("fedalt", {"steps": 3}),
        ("directions", {"round_steps": 3, "warmup": 6, "steps": 10}),
        ("population", {"round_steps": 30, "steps": 10}),
    ],
)
def test_scaled_federation_has_this_number_of_steps(method: str, options: dict[str, int], total: int) -> None:
    """Except for a single step that two batches don't fit in."""
    words = dict(word.split("=") for word in with_steps(federation(method=method, **options), 240, total))
    changed = {key.split(".")[1]: int(value) for key, value in words.items() if key.startswith("personalization.")}
    rounds, personal = int(words["rounds"]), int(words["adapter.personal.steps"])
    again = federation(rounds=rounds, personal=personal, method=method, **{**options, **changed})
    assert total - device_steps(again, 240).total == (total - 5 * rounds) % 2 * (method == "prior")
    assert rounds < 20
    assert changed.get("warmup", 0) < rounds


def test_fewest_steps_are_a_round_and_one_step() -> None:
    assert with_steps(federation(), 240, 1) == ["rounds=1", "adapter.personal.steps=1"]
