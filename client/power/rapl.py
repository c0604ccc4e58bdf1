"""Energy counters of Intel and AMD processors, in /sys/class/powercap (RAPL).

Zones are `intel-rapl:N`, on AMD as well, with `name`, `energy_uj` and `max_energy_range_uj`, at which a counter wraps
(docs.kernel.org/power/powercap). Since Linux 5.10 only root can read them (CVE-2020-8694). From memory, not looked up:
`psys` covers the platform, and `dram` isn't part of its package. `intel-rapl-mmio` counts a package twice, so it is
ignored.
"""

from __future__ import annotations

from pathlib import Path

from client.power.meter import EnergySource, power_meter
from client.power.system import System

COVERS = {
    "psys": "the platform, as its processor measures it (RAPL psys)",
    "package": "processor packages and their memory (RAPL), without board, disk, screen and GPU",
}


class RaplCounters:
    """Joules since creation. Counters are unwrapped, so they must be read before they wrap twice."""

    def __init__(self, system: System) -> None:
        self._system = system
        named = {
            zone: (system.text(zone / "name") or "").split("-")[0]
            for zone in system.glob("sys/class/powercap/intel-rapl:*")
        }
        readable = {zone: name for zone, name in named.items() if system.number(zone / "energy_uj") is not None}
        platform = [zone for zone, name in readable.items() if name == "psys"]
        packages = [zone for zone, name in readable.items() if name in ("package", "dram")]
        self._zones = platform or packages
        self.covers = COVERS["psys" if platform else "package"]
        self._last: dict[Path, float] = {}
        self._joules = 0.0

    def __call__(self) -> float | None:
        """Return joules; None if no counter can be read now. Energy counted meanwhile is part of the next reading."""
        has_reading = False
        for zone in self._zones:
            now = self._system.number(zone / "energy_uj")
            if now is None:
                continue
            has_reading = True
            wrap_at = self._system.number(zone / "max_energy_range_uj")
            self._joules += difference(self._last.get(zone, now), now, wrap_at) / 1e6
            self._last[zone] = now
        return self._joules if has_reading else None


def difference(before: float, now: float, wrap_at: float | None) -> float:
    """Return the increase of a counter between two readings; 0 if it wrapped and its range is unknown.

    Args:
        before: the previous reading.
        now: the current reading.
        wrap_at: the value at which the counter wraps; None: unknown.
    """
    if now >= before:
        return now - before
    return now + wrap_at - before if wrap_at is not None and wrap_at >= before else 0.0


@power_meter(
    "rapl",
    order=4,
    hint=": only root can read its counters; let this user read /sys/class/powercap/intel-rapl:*/energy_uj",
)
def rapl(system: System) -> EnergySource:
    """Make the meter of the processor's counters."""
    counters = RaplCounters(system)
    return EnergySource(name="rapl", covers=counters.covers, read=counters, counts=True)
