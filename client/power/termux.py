"""A phone under Termux, by the commands of Termux:API (the app and the package `termux-api`).

Keys and units are those of its sources, `BatteryStatusAPI.java` and `WifiAPI.java`: percent, °C, mV and µA, the sign of
the current being the vendor's choice. Nothing there tells whether the screen is on, so whether the owner uses a phone
isn't known. Unlike the sources, which this was written from, no phone was at hand.
"""

from __future__ import annotations

import json
from typing import Any

from client.power.conditions import Conditions
from client.power.system import System

COVERS = "the whole phone, by its battery's gauge, while it isn't plugged in"
BATTERY, WIFI = "termux-battery-status", "termux-wifi-connectioninfo"


def battery(system: System) -> Conditions:
    """Charger, battery, its heat, and the watts that it gives while there is no charger."""
    return of_battery(_plain(system.output(BATTERY)))


def network(system: System) -> Conditions:
    """Whether the phone has no Wi-Fi, and so pays for what it sends. A hotspot that is paid for doesn't show."""
    state = _plain(system.output(WIFI)).get("supplicant_state")
    return Conditions(metered=state != "COMPLETED" if isinstance(state, str) else None)


def of_battery(said: dict[str, Any]) -> Conditions:
    """What is in the JSON of `termux-battery-status`."""
    where, state, health = said.get("plugged"), said.get("status"), said.get("health")
    charging = None
    if isinstance(where, str) and where.startswith(("UNPLUGGED", "PLUGGED_")) and where != "PLUGGED_-1":
        charging = where != "UNPLUGGED"
    elif state in ("CHARGING", "DISCHARGING", "FULL"):
        charging = state != "DISCHARGING"
    percent, heat = _number(said.get("percentage")), _number(said.get("temperature"))
    current, voltage = _number(said.get("current")), _number(said.get("voltage"))
    gives = charging is False and current and voltage and voltage > 0
    return Conditions(
        charging=charging,
        battery=None if percent is None or not 0 <= percent <= 100 else percent / 100,
        battery_celsius=heat if heat is not None and -40 < heat < 150 else None,
        throttled=health == "OVERHEAT" if isinstance(health, str) else None,
        watts=abs(current) * voltage / 1e9 if gives and current and voltage else None,
    )


def _plain(text: str | None) -> dict[str, Any]:
    """A JSON object; an empty one if it is anything else."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> float | None:
    """A number, also one that an older version has written as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
