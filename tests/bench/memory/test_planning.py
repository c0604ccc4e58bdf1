"""Rows of a table whose sets are known."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.memory.planning import MIB, fleet, row, shown, timed
from models.footprint.footprint import MARGIN, Footprint
from strategies.planning.knapsack import SiteSet
from strategies.planning.site_selection import RUNTIME
from tests.strategies.planning.test_knapsack import table

COSTS = table({"x": (100 * MIB, 10 * MIB), "y": (60 * MIB, 10 * MIB)})
CHOICE = SiteSet(bytes=70 * MIB, work=0.9, gain=0.5, sites=("y",))


def test_a_row_says_what_all_or_nothing_would_be() -> None:
    needed = MARGIN * (RUNTIME / MIB + 120)
    exact = Footprint(base_bytes=69 * MIB)
    little, enough = (row(int(needed) + more, CHOICE, COSTS, exact) for more in (0, 1))
    assert (little["all_or_nothing"], enough["all_or_nothing"]) == (0.0, 1.0)
    assert (little["sites"], little["gain"]) == (1, 0.5)
    assert little["predicted_mib"] - little["exact_mib"] == pytest.approx(1.0)
    nothing = row(10, None, COSTS, None)
    assert (nothing["sites"], nothing["gain"], nothing["all_or_nothing"]) == (0, 0.0, 0.0)
    told = io.StringIO()
    Console(file=told, width=120).print(shown("t", [little, nothing]))
    assert "50%" in told.getvalue()


def test_a_fleet_has_ten_kinds() -> None:
    assert len({(one.memory_gib, one.examples_per_second) for one in fleet(40)}) == 10
    assert len({one.device for one in fleet(40)}) == 40
    assert timed(lambda: 3)[0] == 3
