"""RAPL counters that wrap, vanish, or count the same energy twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power.rapl import COVERS, RaplCounters, difference
from tests.helpers.power_fakes import system, write

ZONES = "sys/class/powercap"
MAX_RANGE = "262143328850"


def zone(name: str, energy: int) -> dict[str, str]:
    return {"name": name, "energy_uj": str(energy), "max_energy_range_uj": MAX_RANGE}


def tree(zones: dict[str, dict[str, str]]) -> dict[str, str]:
    return {f"{ZONES}/{zone}/{name}": text for zone, files in zones.items() for name, text in files.items()}


TWO = tree(
    {
        "intel-rapl:0": zone("package-0", 5_000_000),
        "intel-rapl:0:0": zone("core", 3_000_000),
        "intel-rapl:0:1": zone("dram", 1_000_000),
        "intel-rapl:1": zone("package-1", 9_000_000),
        "intel-rapl-mmio:0": zone("package-0", 5_000_000),
    }
)


def count(root: Path, zone: str, energy: int) -> None:
    write(root / ZONES / zone / "energy_uj", str(energy))


def test_packages_and_memory_count_once(tmp_path: Path) -> None:
    machine = system(tmp_path, TWO)
    joules = RaplCounters(machine)
    assert joules.covers == COVERS["package"]
    assert joules() == 0
    for name, energy in {":0": 7_000_000, ":0:0": 4_500_000, ":0:1": 1_500_000, ":1": 10_000_000}.items():
        count(machine.root, f"intel-rapl{name}", energy)
    count(machine.root, "intel-rapl-mmio:0", 7_000_000)
    assert joules() == pytest.approx(2 + 0.5 + 1)


def test_platform_counter_is_preferred(tmp_path: Path) -> None:
    machine = system(tmp_path, TWO | tree({"intel-rapl:2": zone("psys", 1_000_000)}))
    joules = RaplCounters(machine)
    assert joules.covers == COVERS["psys"]
    assert joules() == 0
    count(machine.root, "intel-rapl:2", 31_000_000)
    count(machine.root, "intel-rapl:0", 8_000_000)
    assert joules() == pytest.approx(30)


def test_counter_wraps(tmp_path: Path) -> None:
    machine = system(tmp_path, tree({"intel-rapl:0": zone("package-0", int(MAX_RANGE) - 4_000_000)}))
    joules = RaplCounters(machine)
    joules()
    count(machine.root, "intel-rapl:0", 6_000_000)
    assert joules() == pytest.approx(10)
    (machine.root / ZONES / "intel-rapl:0/max_energy_range_uj").unlink()
    count(machine.root, "intel-rapl:0", 1_000_000)  # wrapped again, with unknown range
    assert joules() == pytest.approx(10)
    count(machine.root, "intel-rapl:0", 2_000_000)
    assert joules() == pytest.approx(11)


def test_temporarily_missing_counter(tmp_path: Path) -> None:
    machine = system(tmp_path, tree({"intel-rapl:0": zone("package-0", 0)}))
    joules = RaplCounters(machine)
    joules()
    (machine.root / ZONES / "intel-rapl:0/energy_uj").write_text("")
    assert joules() is None
    count(machine.root, "intel-rapl:0", 3_000_000)
    assert joules() == pytest.approx(3)


def test_counters_readable_by_root_only(tmp_path: Path) -> None:
    assert RaplCounters(system(tmp_path, {f"{ZONES}/intel-rapl:0/name": "package-0"}))() is None
    assert RaplCounters(system(tmp_path))() is None


@pytest.mark.parametrize(
    ("before", "now", "most", "counted"),
    [(1, 3, 10, 2), (3, 3, 10, 0), (9, 1, 10, 2), (9, 1, None, 0), (11, 1, 10, 0)],
)
def test_differences(before: float, now: float, most: float | None, counted: float) -> None:
    assert difference(before, now, most) == counted
