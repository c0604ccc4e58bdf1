"""Tests of the cost of runs, from their output files."""

import json

import pytest

from bench.quality.fleets import GRID, FleetPlan, median_or_none, median_ratio, round_gains, table, target_cost
from conf.compose import compose

KWH = 3.6e6
ROWS = [
    {"round": 0, "base": 2.0, "shared": 2.0},
    {"round": 1, "base": 2.0, "shared": 1.8, "hours": 1.0, "fleet_joules": KWH, "battery_joules": KWH, "lost/flat": 2},
    {"round": 2, "base": None, "shared": None, "hours": 2.0, "fleet_joules": KWH, "battery_joules": 0.0},
    {"round": 3, "base": 2.0, "shared": 1.5, "hours": 3.0, "fleet_joules": KWH, "battery_joules": 0.0, "lost/left": 1},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "summary.json").write_text(json.dumps({"fleet": {"gini": 0.25}}))
    return tmp_path


def test_unmeasured_rounds_add_energy_and_losses(folder):
    rows = round_gains(folder)
    assert [row["round"] for row in rows] == [0, 1, 3]
    assert [row["gain"] for row in rows] == pytest.approx([0.0, 0.1, 0.25])
    assert [row["kwh"] for row in rows] == pytest.approx([0.0, 1.0, 3.0])
    cost = target_cost(folder, 0.2)
    assert (cost.hours, cost.kwh, cost.battery_kwh, cost.round) == (3.0, 3.0, 1.0, 3)
    assert cost.lost == {"flat": 2, "left": 1}
    assert (cost.gini, cost.best) == (0.25, 0.25)


def test_missed_target_has_no_cost(folder):
    cost = target_cost(folder, 0.3)
    assert (cost.hours, cost.kwh, cost.round) == (None, None, None)
    assert cost.lost == {"flat": 2, "left": 1}
    assert median_or_none([cost], "hours") is None
    assert table("", {"one": [cost], "other": [target_cost(folder, 0.1)]}, "one").row_count == 2


def test_ratios_are_paired_by_seed():
    assert median_ratio([1.0, 9.0, 2.0], [2.0, 10.0, 8.0]) == 0.5
    assert median_ratio([1.0, None], [2.0, 2.0]) is None
    assert median_ratio([1.0, 1.0], [2.0, None]) is None


@pytest.mark.parametrize("plan", [GRID[0], GRID[-1], FleetPlan(5, None, 60)], ids=str)
def test_plans_are_valid_configurations(plan):
    config = compose(" ".join(("fleet=week", *plan.overrides)))
    assert config.adapter.shared.steps == plan.steps
    assert config.cohort.eligibility.min_memory_gib == plan.memory_gib
