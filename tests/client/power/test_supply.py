"""Contents of /sys/class/power_supply on laptops, boards and docks."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power.conditions import Conditions
from client.power.supply import is_plugged_in, read_supply
from tests.helpers.power_fakes import LAPTOP, UNPLUGGED, supplies, system


def read(tmp_path: Path, files: dict[str, str]) -> Conditions:
    return read_supply(system(tmp_path, supplies(files)))


def test_laptop_charging_and_discharging(tmp_path: Path) -> None:
    """The gauge's watts are the device's only while the battery is the only supply."""
    assert read(tmp_path / "on", LAPTOP) == Conditions(charging=True, battery=0.85)
    assert read(tmp_path / "off", UNPLUGGED) == Conditions(charging=False, battery=0.85, watts=21.0)


def test_battery_temperature_is_the_hottest(tmp_path: Path) -> None:
    warm = LAPTOP | {"BAT0/temp": "314", "BAT1/type": "Battery", "BAT1/status": "Full", "BAT1/temp": "398"}
    assert read(tmp_path / "two", warm).battery_celsius == pytest.approx(39.8)
    assert read(tmp_path / "none", LAPTOP | {"BAT0/temp": "-2731"}).battery_celsius is None


def test_watts_from_current_of_either_sign(tmp_path: Path) -> None:
    gauge = {name: text for name, text in UNPLUGGED.items() if "power_now" not in name}
    conditions = read(tmp_path, gauge | {"BAT0/current_now": "-1500000", "BAT0/voltage_now": "12000000"})
    assert conditions.watts == pytest.approx(18.0)
    assert read(tmp_path / "half", gauge | {"BAT0/current_now": "-1500000"}).watts is None


def test_two_batteries_one_discharging(tmp_path: Path) -> None:
    second = {"BAT1/type": "Battery", "BAT1/status": "Unknown", "BAT1/energy_now": "10", "BAT1/energy_full": "40"}
    conditions = read(tmp_path, UNPLUGGED | second)
    assert conditions.battery == pytest.approx((0.85 + 0.25) / 2)
    assert conditions.watts == 21.0
    silent = {"BAT1/type": "Battery", "BAT1/status": "Discharging", "BAT1/capacity": "50"}
    assert read(tmp_path / "silent", UNPLUGGED | silent).watts is None  # half of the watts would be no measurement


def test_mouse_and_empty_bay_are_ignored(tmp_path: Path) -> None:
    mouse = {"hid/type": "Battery", "hid/scope": "Device", "hid/status": "Discharging", "hid/capacity": "3"}
    bay = {"BAT1/type": "Battery", "BAT1/present": "0", "BAT1/status": "Unknown"}
    assert read(tmp_path, LAPTOP | mouse | bay) == Conditions(charging=True, battery=0.85)


def test_board_without_battery(tmp_path: Path) -> None:
    assert read(tmp_path, {"rk-usb/type": "USB", "rk-usb/online": "0"}) == Conditions()
    assert read_supply(system(tmp_path / "none")) == Conditions()


@pytest.mark.parametrize(("capacity", "share"), [("100", 1.0), ("130", 1.0), ("-1", 0.0), ("full", None)])
def test_charge_of_battery(tmp_path: Path, capacity: str, share: float | None) -> None:
    assert read(tmp_path, LAPTOP | {"BAT0/capacity": capacity}).battery == share


@pytest.mark.parametrize(
    ("online", "statuses", "charging"),
    [
        ([1.0], ["Discharging"], True),  # the charger is too weak
        ([0.0, 2.0], ["Charging"], True),
        ([0.0], ["Charging"], True),  # wireless charging without an input of its own
        ([0.0], ["Full"], False),
        ([], ["Discharging"], False),
        ([], ["Charging", "Discharging"], True),
        ([], ["Not charging"], True),
        ([], ["Full"], True),
        ([], ["Unknown"], None),
        ([], [""], None),
    ],
)
def test_charger_detection(online: list[float], statuses: list[str], charging: bool | None) -> None:
    assert is_plugged_in(online, statuses) is charging
