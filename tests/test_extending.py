"""docs/extending.md: the examples that are complete modules run, with the documented result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from client.power.meter import METERS
from client.power.system import System
from common.errors import AntherError
from conf.schemas.planning import DeviceProfileConfig
from models.lora.adapter import Factors
from strategies.declarations import create
from strategies.planning import PLANNINGS
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planner
from strategies.registry import AGGREGATIONS, SELECTIONS
from tests.helpers.driven import drive, plain_job
from tests.helpers.fleet import PLAN, REPORT, SITES
from training.jobs import TrainedAdapter
from training.personalization import PERSONALIZATIONS, Personalization, build

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def unregister() -> Iterator[None]:
    """Remove the components that an example registers."""
    axes = (AGGREGATIONS, SELECTIONS, PLANNINGS, METERS, PERSONALIZATIONS)
    before = [(axis, set(axis)) for axis in axes]
    yield
    for axis, names in before:
        for name in set(axis) - names:
            del axis[name]


def example(word: str, language: str = "python") -> str:
    (block,) = [text for kind, text in BLOCKS if kind == language and word in text]
    return block


def module(word: str) -> SimpleNamespace:
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(example(word), "docs/extending.md", "exec"), names)
    return SimpleNamespace(**names)


def adapter(a: float, b: float) -> dict[str, Factors]:
    return {"site": Factors(torch.full((2, 3), a), torch.full((4, 2), b))}


def test_aggregation_rule() -> None:
    rule = module("class SignMean").SignMean()
    updates = [(adapter(1.0, -2.0), 1.0), (adapter(3.0, -4.0), 1.0), (adapter(-9.0, 9.0), 1.0)]
    result = rule.aggregate(adapter(0.0, 0.0), updates, round=1).adapter
    torch.testing.assert_close(tuple(result["site"]), tuple(adapter(2.0, -3.0)["site"]))
    single = rule.aggregate(adapter(0.0, 0.0), updates[:1], round=1).adapter
    torch.testing.assert_close(tuple(single["site"]), tuple(adapter(1.0, -2.0)["site"]))
    values = yaml.safe_load(example("name: sign_mean", "yaml"))
    kept = create(AGGREGATIONS, values.pop("name"), {**values, "min_majority": 0.5}, key="aggregation")
    torch.testing.assert_close(
        tuple(kept.aggregate(adapter(7.0, 8.0), updates, round=1).adapter["site"]), tuple(adapter(7.0, 8.0)["site"])
    )
    with pytest.raises(AntherError, match=r"^aggregation\.min_majority=2\.0: must be 0 to 1$"):
        create(AGGREGATIONS, "sign_mean", {"min_majority": 2}, key="aggregation")
    assert type(rule) is AGGREGATIONS["sign_mean"]
    assert {name for name in vars(AGGREGATIONS["ffa"]) if not name.startswith("_")} <= set(vars(type(rule)))


def test_selection() -> None:
    rule = module("class Shortest").Shortest(size=2)
    assert type(rule) is SELECTIONS["shortest"]
    devices = {name: SimpleNamespace(seconds=seconds) for name, seconds in (("a", 3.0), ("b", 1.0), ("c", 2.0))}
    assert rule.select(devices, draw=0) == ["b", "c"]
    assert type(rule.sensitivity) is type(SELECTIONS["round_robin"].sensitivity)


def test_planning_method() -> None:
    method = module("class HalfPlanning").HalfPlanning()
    assert type(method) is PLANNINGS["half"]
    planner = Planner(sites=SITES, limits=PlanLimits(), method=method)
    reports = [replace(REPORT, device="a")]
    for steps, planned in ((9, 4), (1, 1)):
        plans = planner.plans(reports, replace(PLAN, steps=steps), adapter={}, download=1)
        assert plans["a"].plan == replace(PLAN, steps=planned)


def test_device_profile() -> None:
    profile = DeviceProfileConfig(**yaml.safe_load(example("name: pi3", "yaml")))
    assert profile.memory_gib == 0.6


@pytest.mark.parametrize(("files", "watts"), [({}, None), ({"name": "ina219\n", "power1_input": "5200000\n"}, 5.2)])
def test_power_meter(files: dict[str, str], watts: float | None, tmp_path: Path) -> None:
    folder = tmp_path / "sys" / "class" / "hwmon" / "hwmon0"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    assert module("INA219").watts(System(root=tmp_path)) == watts
    source = METERS["ina219"].source(System(root=tmp_path))
    assert (source and source.read()) == watts


def test_personalization_method() -> None:
    """It trains B only, with the YAML's option; options are checked on the device."""
    rule = module("class BOnTop").BOnTop
    assert rule is PERSONALIZATIONS["b_on_top"]
    values = yaml.safe_load(example("name: b_on_top", "yaml"))
    method = create(PERSONALIZATIONS, values.pop("name"), values, key="personalization")
    job, trained = plain_job(adapter(1.0, 0.0)), TrainedAdapter(adapter(1.0, 2.0), 0.1, 2)
    result, done = drive(method.fit(job, adapter(3.0, 4.0), []), lambda _: trained)
    assert result is trained.adapter
    assert done == [replace(job, trains="b", proximal=0.01)]
    with pytest.raises(AntherError, match=r"^personalization\.proximal=-1\.0: must be 0 or more$"):
        build("b_on_top", {"proximal": -1.0})


def test_table_of_personalization_names_every_hook() -> None:
    rows = PAGE[PAGE.index("| attribute or method |") :].partition("\n\n")[0]
    hooks = {name for name in vars(Personalization) if not name.startswith("_")}
    assert {name for row in rows.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])} == hooks
    named = {name for row in rows.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[3])}
    assert named | {"lora"} == set(PERSONALIZATIONS)
