"""Heat, memory, network and owner of a Linux machine."""

from __future__ import annotations

import math
import re
from pathlib import Path

from client.power.conditions import Conditions
from client.power.system import System
from common.units import MIB

# Cooling by running slower, as the kernel calls it (recalled: `Processor` of ACPI, the others of cpufreq); a fan that
# turns is no sign of it.
_SLOWS = re.compile(r"Processor|(thermal-)?cpufreq-.*|devfreq-.*")


def heat(system: System) -> Conditions:
    """The hottest plausible zone of /sys/class/thermal, and whether cores are cooled by running slower."""
    zones = [system.number(zone / "temp") for zone in system.found("sys/class/thermal/thermal_zone*")]
    celsius = [value / 1000 for value in zones if value is not None and -40_000 < value < 150_000]  # else: no sensor
    states = [
        system.number(device / "cur_state")
        for device in system.found("sys/class/thermal/cooling_device*")
        if _SLOWS.fullmatch(system.text(device / "type") or "")
    ]
    known = [state > 0 for state in states if state is not None]
    return Conditions(celsius=max(celsius, default=None), throttled=any(known) if known else None)


def memory(system: System) -> Conditions:
    """MiB that are free: of the machine, and of every control group that holds us to less (cgroup v2)."""
    free = _available(system)
    for group in _groups(system):
        most, used = system.number(group / "memory.max"), system.number(group / "memory.current")
        if most is not None and used is not None:  # without a limit it says `max`
            free = min(free, most - used + _reclaimable(system, group))
    return Conditions(free_mib=free / MIB)


def owner(system: System) -> Conditions:
    """Whether somebody uses screen and keyboard, by what logind says of the seat.

    A desktop tells logind when nobody does; bare window managers never do, and look used all day. Input devices
    themselves are root's.
    """
    match _property(system, "login1", "/org/freedesktop/login1/seat/seat0", "login1.Seat", "IdleHint"):
        case "true":
            return Conditions(owner_active=False)
        case "false":
            return Conditions(owner_active=True)
    return Conditions()


def network(system: System) -> Conditions:
    """Whether NetworkManager takes the network for metered: 0 unknown, 1 yes, 2 no, 3 and 4 the same as guesses."""
    place = "/org/freedesktop/NetworkManager"
    match _property(system, "NetworkManager", place, "NetworkManager", "Metered"):
        case "1" | "3":
            return Conditions(metered=True)
        case "2" | "4":
            return Conditions(metered=False)
    return Conditions()


def _available(system: System) -> float:
    """Bytes, by the kernel's own estimate; by psutil where there is no /proc."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", system.text("proc/meminfo") or "", re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    if system.root != Path("/"):
        return math.inf
    import psutil  # slow to import

    return float(psutil.virtual_memory().available)


def _groups(system: System) -> list[Path]:
    """Our control group and those around it, as a unit of systemd's or a container has one."""
    match = re.search(r"^0::/(.*)$", system.text("proc/self/cgroup") or "", re.MULTILINE)
    own = Path("sys/fs/cgroup") / (match[1] if match else "")
    return [group for group in (own, *own.parents) if group.parts[:3] == ("sys", "fs", "cgroup")]


def _reclaimable(system: System, group: Path) -> float:
    """Bytes of files that nobody has read for a while: they are counted as used, and given up first."""
    match = re.search(r"^inactive_file (\d+)$", system.text(group / "memory.stat") or "", re.MULTILINE)
    return float(match[1]) if match else 0.0


def _property(system: System, service: str, place: str, interface: str, name: str) -> str | None:
    """A property of the system bus; `busctl` prints its type and it, such as `b true` or `u 4`."""
    domain = "org.freedesktop."
    said = system.output("busctl", "get-property", domain + service, place, domain + interface, name)
    return said.split()[-1] if said and said.strip() else None
