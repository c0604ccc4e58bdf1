"""Energy counters of Intel's and AMD's processors, in /sys/class/powercap (RAPL).

Zones are `intel-rapl:N`, on AMD as well, with `name`, `energy_uj` and `max_energy_range_uj`, after which a counter
starts again (docs.kernel.org/power/powercap). Since Linux 5.10 only root reads them (CVE-2020-8694). That `psys` covers
the platform and that `dram` isn't in its package is recalled. `intel-rapl-mmio` counts a package twice, so it isn't
looked at.
"""

from __future__ import annotations

from pathlib import Path

from client.power.system import System

COVERS = {
    "psys": "the platform as its processor counts (RAPL psys)",
    "package": "processor packages and their memory alone (RAPL): no board, disk, screen or GPU",
}


class RaplCounters:
    """Joules since it was made; unwraps the counters, so it has to be asked before they start again twice."""

    def __init__(self, system: System) -> None:
        self._system = system
        named = {
            zone: (system.text(zone / "name") or "").split("-")[0]
            for zone in system.found("sys/class/powercap/intel-rapl:*")
        }
        readable = {zone: name for zone, name in named.items() if system.number(zone / "energy_uj") is not None}
        platform = [zone for zone, name in readable.items() if name == "psys"]
        packages = [zone for zone, name in readable.items() if name in ("package", "dram")]
        self._zones = platform or packages
        self.covers = COVERS["psys" if platform else "package"]
        self._last: dict[Path, float] = {}
        self._joules = 0.0

    def __call__(self) -> float | None:
        """None if no counter can be read now; what it counted meanwhile comes with the next."""
        heard = False
        for zone in self._zones:
            now = self._system.number(zone / "energy_uj")
            if now is None:
                continue
            heard = True
            most = self._system.number(zone / "max_energy_range_uj")
            self._joules += difference(self._last.get(zone, now), now, most) / 1e6
            self._last[zone] = now
        return self._joules if heard else None


def difference(before: float, now: float, most: float | None) -> float:
    """What a counter counted between two looks; 0 where it started again, and how far it goes isn't known."""
    if now >= before:
        return now - before
    return now + most - before if most is not None and most >= before else 0.0
