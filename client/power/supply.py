"""Batteries and chargers as Linux tells of them, in /sys/class/power_supply.

Attributes and units are the kernel's (include/linux/power_supply.h: µV, µA, µW, µWh, tenths of °C): `type`, `online`,
`status`, `capacity`, `temp`, and `scope`, which is `Device` for the battery of a mouse, say. That `online` is 2 behind
some USB chargers is recalled, not looked up. Android mostly keeps all this from apps.
"""

from __future__ import annotations

from pathlib import Path

from client.power.conditions import Conditions
from client.power.system import System

COVERS = "the whole device, by its battery's gauge, while it isn't plugged in"
SUPPLIES = "sys/class/power_supply/*"
PLUGGED = {"Charging", "Full", "Not charging"}
DISCHARGING = "Discharging"


def supply(system: System) -> Conditions:
    """Charger, battery, and the watts that a battery gives while it is all that there is.

    On a charger a gauge tells what goes into the battery, which isn't what the device draws: no watts then.
    """
    found = [folder for folder in system.found(SUPPLIES) if system.text(folder / "scope") != "Device"]
    kinds = {folder: system.text(folder / "type") for folder in found}
    batteries = [
        folder for folder in found if kinds[folder] in ("Battery", "UPS") and system.number(folder / "present") != 0
    ]
    if not batteries:  # boards without one have inputs that are never online
        return Conditions()
    online = [system.number(folder / "online") for folder in found if folder not in batteries]
    charging = plugged([value for value in online if value is not None], [_status(system, one) for one in batteries])
    shares = [share for one in batteries if (share := _share(system, one)) is not None]
    heat = [tenths / 10 for one in batteries if (tenths := system.number(one / "temp")) is not None]
    return Conditions(
        charging=charging,
        battery=sum(shares) / len(shares) if shares else None,
        battery_celsius=max((value for value in heat if -40 < value < 150), default=None),
        watts=None if charging is not False else _watts(system, batteries),
    )


def plugged(online: list[float], statuses: list[str]) -> bool | None:
    """Whether there is a charger, from what inputs and batteries say; None: they don't."""
    if any(value > 0 for value in online) or "Charging" in statuses:
        return True
    if online or DISCHARGING in statuses:
        return False
    return True if PLUGGED & set(statuses) else None


def _status(system: System, battery: Path) -> str:
    return system.text(battery / "status") or ""


def _share(system: System, battery: Path) -> float | None:
    """What is left of a full one."""
    if (percent := system.number(battery / "capacity")) is not None:
        return min(1.0, max(0.0, percent / 100))
    for unit in ("energy", "charge"):
        now, full = (system.number(battery / f"{unit}_{when}") for when in ("now", "full"))
        if now is not None and full:
            return min(1.0, max(0.0, now / full))
    return None


def _watts(system: System, batteries: list[Path]) -> float | None:
    """What batteries give together; None if one of those that give doesn't say."""
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
        total += abs(microwatts) / 1e6  # the sign is the driver's choice
    return total or None
