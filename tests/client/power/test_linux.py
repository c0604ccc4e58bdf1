"""Temperature, memory, owner activity and network of a Linux machine."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest

from client.power import linux
from client.power.conditions import Conditions
from client.power.system import System
from common.units import MIB
from tests.helpers.power_fakes import system

ZONE = "sys/class/thermal/thermal_zone"
FAN = "sys/class/thermal/cooling_device"


def test_hottest_plausible_zone(tmp_path: Path) -> None:
    zones = {
        f"{ZONE}0/temp": "51000",
        f"{ZONE}1/temp": "67500",
        f"{ZONE}2/temp": "-274000",
        f"{ZONE}3/temp": "255000",
        f"{ZONE}4/temp": "",
    }
    assert linux.heat(system(tmp_path, zones)) == Conditions(celsius=67.5)
    assert linux.heat(system(tmp_path / "none")) == Conditions()


def test_fan_is_not_throttling(tmp_path: Path) -> None:
    result = {f"{FAN}0/type": "pwm-fan", f"{FAN}0/cur_state": "4"}
    assert linux.heat(system(tmp_path, result)).throttled is None
    result |= {f"{FAN}1/type": "cpufreq-cpu0", f"{FAN}1/cur_state": "0", f"{FAN}2/type": "Processor"}
    assert linux.heat(system(tmp_path, result)).throttled is False
    assert linux.heat(system(tmp_path, result | {f"{FAN}1/cur_state": "3"})).throttled is True


MEMINFO = {"proc/meminfo": "MemTotal: 4000000 kB\nMemFree: 9 kB\nMemAvailable: 1048576 kB"}


def test_memory_of_machine(tmp_path: Path) -> None:
    assert linux.memory(system(tmp_path, MEMINFO)).free_mib == 1024
    assert linux.memory(system(tmp_path / "none")).free_mib == math.inf


def test_memory_of_systemd_unit(tmp_path: Path) -> None:
    """The limit of the unit or of a group around it; inactive file pages count as free."""
    files = MEMINFO | {
        "proc/self/cgroup": "0::/system.slice/anther.service",
        "sys/fs/cgroup/system.slice/anther.service/memory.max": str(900 * MIB),
        "sys/fs/cgroup/system.slice/anther.service/memory.current": str(700 * MIB),
        "sys/fs/cgroup/system.slice/anther.service/memory.stat": f"anon 5\ninactive_file {100 * MIB}\nactive_file 7",
        "sys/fs/cgroup/system.slice/memory.max": "max",
        "sys/fs/cgroup/system.slice/memory.current": str(800 * MIB),
    }
    assert linux.memory(system(tmp_path, files)).free_mib == 300
    around = {"sys/fs/cgroup/system.slice/memory.max": str(1000 * MIB)}
    assert linux.memory(system(tmp_path, files | around)).free_mib == 200


def test_memory_of_container(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/v1\n0::/",
        "sys/fs/cgroup/memory.max": str(64 * MIB),
        "sys/fs/cgroup/memory.current": str(32 * MIB),
    }
    assert linux.memory(system(tmp_path, MEMINFO | files)).free_mib == 32


def test_memory_agrees_with_psutil() -> None:
    free = linux.memory(System()).free_mib
    assert 0 < free <= psutil.virtual_memory().total / MIB


@pytest.mark.parametrize(
    ("output", "active"), [("b true", False), ("b false", True), ("b maybe", None), (" ", None), ("", None)]
)
def test_owner_activity(tmp_path: Path, output: str, active: bool | None) -> None:
    assert linux.owner(system(tmp_path, commands={"busctl": output})) == Conditions(owner_active=active)


@pytest.mark.parametrize(
    ("output", "metered"), [("u 0", None), ("u 1", True), ("u 2", False), ("u 3", True), ("u 4", False), ("", None)]
)
def test_metered_network(tmp_path: Path, output: str, metered: bool | None) -> None:
    assert linux.network(system(tmp_path, commands={"busctl": output})) == Conditions(metered=metered)
