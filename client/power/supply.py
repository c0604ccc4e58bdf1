"""Batteries and chargers in /sys/class/power_supply.

Attributes and units are the kernel's (include/linux/power_supply.h: µV, µA, µW, µWh, tenths of °C): `type`, `online`,
`status`, `capacity`, `temp`, and `scope`, which is `Device` for, e.g., the battery of a mouse. From memory, not looked
up: `online` is 2 behind some USB chargers. Android mostly hides all this from apps.
"""

from __future__ import annotations

from pathlib import Path

from client.power.conditions import Conditions
from client.power.meter import EnergySource, power_meter
from client.power.system import System

COVERS = "the whole device, measured by its battery while it isn't plugged in"
SUPPLIES = "sys/class/power_supply/*"
PLUGGED = {"Charging", "Full", "Not charging"}
DISCHARGING = "Discharging"


def read_supply(system: System) -> Conditions:
    """Read charger and battery, and the battery's watts while it is the only supply.

    While charging, no watts are returned: the gauge measures the power into the battery, not the device's consumption.
    """
    supplies = [folder for folder in system.glob(SUPPLIES) if system.text(folder / "scope") != "Device"]
    kinds = {folder: system.text(folder / "type") for folder in supplies}
    batteries = [
        folder for folder in supplies if kinds[folder] in ("Battery", "UPS") and system.number(folder / "present") != 0
    ]
    if not batteries:  # boards without a battery have inputs that are never online
        return Conditions()
    online = [system.number(folder / "online") for folder in supplies if folder not in batteries]
    charging = is_plugged_in(
        [value for value in online if value is not None], [_status(system, battery) for battery in batteries]
    )
    shares = [share for battery in batteries if (share := _charge(system, battery)) is not None]
    heat = [tenths / 10 for battery in batteries if (tenths := system.number(battery / "temp")) is not None]
    return Conditions(
        charging=charging,
        battery=sum(shares) / len(shares) if shares else None,
        battery_celsius=max((value for value in heat if -40 < value < 150), default=None),
        watts=None if charging is not False else _watts(system, batteries),
    )


def is_plugged_in(online: list[float], statuses: list[str]) -> bool | None:
    """Return whether a charger is connected, from the states of inputs and batteries; None: unknown."""
    if any(value > 0 for value in online) or "Charging" in statuses:
        return True
    if online or DISCHARGING in statuses:
        return False
    return True if PLUGGED & set(statuses) else None


def _status(system: System, battery: Path) -> str:
    return system.text(battery / "status") or ""


def _charge(system: System, battery: Path) -> float | None:
    """Return the charge of a battery, 0 to 1."""
    if (percent := system.number(battery / "capacity")) is not None:
        return min(1.0, max(0.0, percent / 100))
    for unit in ("energy", "charge"):
        now, full = (system.number(battery / f"{unit}_{when}") for when in ("now", "full"))
        if now is not None and full:
            return min(1.0, max(0.0, now / full))
    return None


def _watts(system: System, batteries: list[Path]) -> float | None:
    """Return the total power of all discharging batteries; None if one of them doesn't report it."""
    total = 0.0
    for battery in batteries:
        if _status(system, battery) != DISCHARGING:
            continue
        microwatts = system.number(battery / "power_now")
        if microwatts is None:
            current, voltage = (system.number(battery / f"{what}_now") for what in ("current", "voltage"))
            microwatts = None if current is None or voltage is None else current * voltage / 1e6
        if microwatts is None:
            return None
        total += abs(microwatts) / 1e6  # the sign depends on the driver
    return total or None


def _has_battery(system: System) -> bool:
    """Return whether there is a battery: it reports no watts while charging."""
    return read_supply(system).battery is not None


@power_meter(
    "battery",
    order=2,
    works=_has_battery,
    hint=": needs a battery that the kernel lists in /sys/class/power_supply",
)
def battery(system: System) -> EnergySource:
    """Make the meter of a battery."""
    return EnergySource(name="battery", covers=COVERS, read=lambda: read_supply(system).watts)
