"""Output of Termux:API's commands on a phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.power import termux
from client.power.conditions import Conditions
from tests.helpers.power_fakes import system

# Keys as in BatteryStatusAPI.java.
PHONE: dict[str, Any] = {
    "present": True,
    "technology": "Li-ion",
    "health": "GOOD",
    "plugged": "UNPLUGGED",
    "status": "DISCHARGING",
    "temperature": 31.4,
    "voltage": 4000,
    "current": -820000,
    "current_average": -576,
    "percentage": 85,
    "level": 85,
    "scale": 100,
    "charge_counter": 3194654,
    "energy": None,
}


def read(tmp_path: Path, **changes: object) -> Conditions:
    return termux.read_battery(system(tmp_path, commands={termux.BATTERY: json.dumps(PHONE | changes, indent=2)}))


def test_phone_on_battery(tmp_path: Path) -> None:
    conditions = read(tmp_path)
    assert (conditions.charging, conditions.battery, conditions.battery_celsius, conditions.throttled) == (
        False,
        0.85,
        31.4,
        False,
    )
    assert conditions.watts == pytest.approx(0.82 * 4.0)
    assert conditions.owner_active is None
    assert read(tmp_path, current=820000).watts == pytest.approx(3.28)  # a vendor with the opposite sign


def test_charging_phone_gives_no_watts(tmp_path: Path) -> None:
    conditions = read(tmp_path, plugged="PLUGGED_AC", status="NOT_CHARGING", health="OVERHEAT", temperature="45.0")
    assert conditions == Conditions(charging=True, battery=0.85, battery_celsius=45.0, throttled=True)
    assert read(tmp_path, plugged="PLUGGED_WIRELESS").charging
    assert read(tmp_path, plugged="PLUGGED_DOCK").charging


@pytest.mark.parametrize(
    ("plugged", "status", "charging"),
    [
        ("PLUGGED_-1", "CHARGING", True),
        ("PLUGGED_-1", "UNKNOWN", None),
        (None, "FULL", True),
        (7, "DISCHARGING", False),
    ],
)
def test_unclear_charging_state(tmp_path: Path, plugged: object, status: str, charging: bool | None) -> None:
    assert read(tmp_path, plugged=plugged, status=status).charging is charging


def test_invalid_numbers(tmp_path: Path) -> None:
    """Android uses its smallest integer for a missing value."""
    conditions = read(tmp_path, temperature=-214748364.8, percentage=-2147483648, current=None, health=None)
    assert conditions == Conditions(charging=False)


@pytest.mark.parametrize("text", [" ", "[]", "Termux:API is not yet available on Google Play", '{"percentage": [1]}'])
def test_invalid_output_is_no_reading(tmp_path: Path, text: str) -> None:
    assert termux.read_battery(system(tmp_path, commands={termux.BATTERY: text})) == Conditions()
    assert termux.network(system(tmp_path, commands={termux.WIFI: text})) == Conditions()


@pytest.mark.parametrize(("state", "metered"), [("COMPLETED", False), ("DISCONNECTED", True), (3, None)])
def test_no_wifi_means_metered(tmp_path: Path, state: object, metered: bool | None) -> None:
    output = json.dumps({"ssid": "x", "supplicant_state": state})
    assert termux.network(system(tmp_path, commands={termux.WIFI: output})).metered is metered
