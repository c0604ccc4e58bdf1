"""Trees of /sys/class/power_supply, as laptops, boards and docks have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power.conditions import Conditions
from client.power.supply import plugged, supply
from tests.helpers.power_fakes import LAPTOP, UNPLUGGED, supplies, system


def read(tmp_path: Path, files: dict[str, str]) -> Conditions:
    return supply(system(tmp_path, supplies(files)))


def test_a_laptop_on_its_charger_and_off_it(tmp_path: Path) -> None:
    """A gauge's watts are the device's only while the battery is all there is."""
    assert read(tmp_path / "on", LAPTOP) == Conditions(charging=True, battery=0.85)
    assert read(tmp_path / "off", UNPLUGGED) == Conditions(charging=False, battery=0.85, watts=21.0)


def test_a_battery_tells_its_heat_in_tenths_and_its_hottest_counts(tmp_path: Path) -> None:
    warm = LAPTOP | {"BAT0/temp": "314", "BAT1/type": "Battery", "BAT1/status": "Full", "BAT1/temp": "398"}
    assert read(tmp_path / "two", warm).battery_celsius == pytest.approx(39.8)
    assert read(tmp_path / "none", LAPTOP | {"BAT0/temp": "-2731"}).battery_celsius is None


def test_current_times_voltage_of_either_sign(tmp_path: Path) -> None:
    gauge = {name: text for name, text in UNPLUGGED.items() if "power_now" not in name}
    found = read(tmp_path, gauge | {"BAT0/current_now": "-1500000", "BAT0/voltage_now": "12000000"})
    assert found.watts == pytest.approx(18.0)
    assert read(tmp_path / "half", gauge | {"BAT0/current_now": "-1500000"}).watts is None


def test_two_batteries_of_which_one_gives(tmp_path: Path) -> None:
    second = {"BAT1/type": "Battery", "BAT1/status": "Unknown", "BAT1/energy_now": "10", "BAT1/energy_full": "40"}
    found = read(tmp_path, UNPLUGGED | second)
    assert found.battery == pytest.approx((0.85 + 0.25) / 2)
    assert found.watts == 21.0
    silent = {"BAT1/type": "Battery", "BAT1/status": "Discharging", "BAT1/capacity": "50"}
    assert read(tmp_path / "silent", UNPLUGGED | silent).watts is None  # half of it would be no measurement


def test_a_mouse_and_an_empty_bay_are_no_battery(tmp_path: Path) -> None:
    mouse = {"hid/type": "Battery", "hid/scope": "Device", "hid/status": "Discharging", "hid/capacity": "3"}
    bay = {"BAT1/type": "Battery", "BAT1/present": "0", "BAT1/status": "Unknown"}
    assert read(tmp_path, LAPTOP | mouse | bay) == Conditions(charging=True, battery=0.85)


def test_a_board_without_a_battery_is_not_off_its_charger(tmp_path: Path) -> None:
    assert read(tmp_path, {"rk-usb/type": "USB", "rk-usb/online": "0"}) == Conditions()
    assert supply(system(tmp_path / "none")) == Conditions()


@pytest.mark.parametrize(("capacity", "share"), [("100", 1.0), ("130", 1.0), ("-1", 0.0), ("full", None)])
def test_shares(tmp_path: Path, capacity: str, share: float | None) -> None:
    assert read(tmp_path, LAPTOP | {"BAT0/capacity": capacity}).battery == share


@pytest.mark.parametrize(
    ("online", "statuses", "charging"),
    [
        ([1.0], ["Discharging"], True),  # a charger that is too weak
        ([0.0, 2.0], ["Charging"], True),
        ([0.0], ["Charging"], True),  # by a coil that has no input of its own
        ([0.0], ["Full"], False),
        ([], ["Discharging"], False),
        ([], ["Charging", "Discharging"], True),
        ([], ["Not charging"], True),
        ([], ["Full"], True),
        ([], ["Unknown"], None),
        ([], [""], None),
    ],
)
def test_whether_there_is_a_charger(online: list[float], statuses: list[str], charging: bool | None) -> None:
    assert plugged(online, statuses) is charging
