"""Temperature, memory, network and owner activity of a Linux machine."""

from __future__ import annotations

import math
import re
from pathlib import Path

from client.power.conditions import Conditions
from client.power.system import System
from common.units import MIB

# Kernel names of cooling devices that slow the processor down (from memory: `Processor` is of ACPI, the others are of
# cpufreq). A running fan does not count.
_SLOWS = re.compile(r"Processor|(thermal-)?cpufreq-.*|devfreq-.*")


def heat(system: System) -> Conditions:
    """Read the hottest plausible zone of /sys/class/thermal, and whether cores are slowed down to cool."""
    zones = [system.number(zone / "temp") for zone in system.glob("sys/class/thermal/thermal_zone*")]
    # Other values mean that there is no sensor.
    celsius = [value / 1000 for value in zones if value is not None and -40_000 < value < 150_000]
    states = [
        system.number(device / "cur_state")
        for device in system.glob("sys/class/thermal/cooling_device*")
        if _SLOWS.fullmatch(system.text(device / "type") or "")
    ]
    slowed = [state > 0 for state in states if state is not None]
    return Conditions(celsius=max(celsius, default=None), throttled=any(slowed) if slowed else None)


def memory(system: System) -> Conditions:
    """Read the free memory: of the machine, and of every control group that limits this process (cgroup v2)."""
    free = _available(system)
    for group in _groups(system):
        limit, used = system.number(group / "memory.max"), system.number(group / "memory.current")
        if limit is not None and used is not None:  # without a limit the file contains `max`
            free = min(free, limit - used + _reclaimable(system, group))
    return Conditions(free_mib=free / MIB)


def owner(system: System) -> Conditions:
    """Return whether screen and keyboard are in use, by logind's idle hint for the seat.

    A desktop reports to logind when it is idle. Bare window managers never do, so they look used all day. The input
    devices themselves are readable by root only.
    """
    match _bus_property(system, "login1", "/org/freedesktop/login1/seat/seat0", "login1.Seat", "IdleHint"):
        case "true":
            return Conditions(owner_active=False)
        case "false":
            return Conditions(owner_active=True)
    return Conditions()


def network(system: System) -> Conditions:
    """Return whether NetworkManager considers the network metered.

    Its values are 0 unknown, 1 yes, 2 no, 3 guessed yes, 4 guessed no.
    """
    path = "/org/freedesktop/NetworkManager"
    match _bus_property(system, "NetworkManager", path, "NetworkManager", "Metered"):
        case "1" | "3":
            return Conditions(metered=True)
        case "2" | "4":
            return Conditions(metered=False)
    return Conditions()


def _available(system: System) -> float:
    """Return available bytes by the kernel's own estimate; by psutil if there is no /proc."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", system.text("proc/meminfo") or "", re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    if system.root != Path("/"):
        return math.inf
    import psutil  # slow to import

    return float(psutil.virtual_memory().available)


def _groups(system: System) -> list[Path]:
    """List this process' control group and its parents, as set by a systemd unit or a container."""
    match = re.search(r"^0::/(.*)$", system.text("proc/self/cgroup") or "", re.MULTILINE)
    own = Path("sys/fs/cgroup") / (match[1] if match else "")
    return [group for group in (own, *own.parents) if group.parts[:3] == ("sys", "fs", "cgroup")]


def _reclaimable(system: System, group: Path) -> float:
    """Return bytes of the inactive page cache: they are counted as used, but are reclaimed first."""
    match = re.search(r"^inactive_file (\d+)$", system.text(group / "memory.stat") or "", re.MULTILINE)
    return float(match[1]) if match else 0.0


def _bus_property(system: System, service: str, path: str, interface: str, name: str) -> str | None:
    """Read a property from the system bus; `busctl` prints its type and value, such as `b true` or `u 4`.

    Args:
        system: runs the command.
        service: name of the service, below `org.freedesktop`.
        path: object path.
        interface: name of the interface, below `org.freedesktop`.
        name: name of the property.
    """
    domain = "org.freedesktop."
    output = system.output("busctl", "get-property", domain + service, path, domain + interface, name)
    return output.split()[-1] if output and output.strip() else None
