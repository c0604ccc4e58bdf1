"""Tests of the table on known sets of sites."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.memory.planning import MIB, make_fleet, result_row, result_table, time_cpu
from models.footprint.footprint import MARGIN, Footprint
from strategies.planning.knapsack import SiteSet
from strategies.planning.site_selection import RUNTIME
from tests.strategies.planning.test_knapsack import table

COSTS = table({"x": (100 * MIB, 10 * MIB), "y": (60 * MIB, 10 * MIB)})
CHOICE = SiteSet(bytes=70 * MIB, work=0.9, gain=0.5, sites=("y",))


def test_row_shows_the_all_or_nothing_choice() -> None:
    needed = MARGIN * (RUNTIME / MIB + 120)
    exact = Footprint(base_bytes=69 * MIB)
    little, enough = (result_row(int(needed) + more, CHOICE, COSTS, exact) for more in (0, 1))
    assert (little["all_or_nothing"], enough["all_or_nothing"]) == (0.0, 1.0)
    assert (little["sites"], little["gain"]) == (1, 0.5)
    assert little["predicted_mib"] - little["exact_mib"] == pytest.approx(1.0)
    nothing = result_row(10, None, COSTS, None)
    assert (nothing["sites"], nothing["gain"], nothing["all_or_nothing"]) == (0, 0.0, 0.0)
    output = io.StringIO()
    Console(file=output, width=120).print(result_table("t", [little, nothing]))
    assert "50%" in output.getvalue()


def test_fleet_has_ten_device_types() -> None:
    assert len({(report.memory_gib, report.examples_per_second) for report in make_fleet(40)}) == 10
    assert len({report.device for report in make_fleet(40)}) == 40
    assert time_cpu(lambda: 3)[0] == 3
