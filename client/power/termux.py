"""A phone under Termux, by the commands of Termux:API (the app and the package `termux-api`).

Keys and units are those of its sources, `BatteryStatusAPI.java` and `WifiAPI.java`: percent, °C, mV and µA; the sign of
the current depends on the vendor. No command reports whether the screen is on, so the owner's activity is unknown. This
was written from those sources and has not been tried on a phone.
"""

from __future__ import annotations

import json
from typing import Any

from client.power.conditions import Conditions
from client.power.meter import EnergySource, power_meter
from client.power.system import System

COVERS = "the whole phone, measured by its battery while it isn't plugged in"
BATTERY, WIFI = "termux-battery-status", "termux-wifi-connectioninfo"


def read_battery(system: System) -> Conditions:
    """Read charger, battery, its temperature, and its power while discharging."""
    return parse_battery(_plain(system.output(BATTERY)))


def network(system: System) -> Conditions:
    """Return whether the phone has no Wi-Fi, and so uses mobile data. A metered hotspot isn't recognized."""
    state = _plain(system.output(WIFI)).get("supplicant_state")
    return Conditions(metered=state != "COMPLETED" if isinstance(state, str) else None)


def parse_battery(status: dict[str, Any]) -> Conditions:
    """Parse the JSON of `termux-battery-status`."""
    plugged, state, health = status.get("plugged"), status.get("status"), status.get("health")
    charging = None
    if isinstance(plugged, str) and plugged.startswith(("UNPLUGGED", "PLUGGED_")) and plugged != "PLUGGED_-1":
        charging = plugged != "UNPLUGGED"
    elif state in ("CHARGING", "DISCHARGING", "FULL"):
        charging = state != "DISCHARGING"
    percent, heat = _number(status.get("percentage")), _number(status.get("temperature"))
    current, voltage = _number(status.get("current")), _number(status.get("voltage"))
    discharging = charging is False and current and voltage and voltage > 0
    return Conditions(
        charging=charging,
        battery=None if percent is None or not 0 <= percent <= 100 else percent / 100,
        battery_celsius=heat if heat is not None and -40 < heat < 150 else None,
        throttled=health == "OVERHEAT" if isinstance(health, str) else None,
        watts=abs(current) * voltage / 1e9 if discharging and current and voltage else None,
    )


def _plain(text: str | None) -> dict[str, Any]:
    """Parse a JSON object; an empty one for any other text."""
    try:
        parsed = json.loads(text or "")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _number(value: object) -> float | None:
    """Return a number; older versions may write it as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _has_battery(system: System) -> bool:
    """Return whether there is a battery: it reports no watts while charging."""
    return read_battery(system).battery is not None


@power_meter(
    "termux",
    order=3,
    works=_has_battery,
    hint=": needs the app Termux:API, and `pkg install termux-api`",
)
def termux(system: System) -> EnergySource:
    """Make the meter of a phone's battery."""
    return EnergySource(name="termux", covers=COVERS, read=lambda: read_battery(system).watts)
