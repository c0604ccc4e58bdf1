"""Which of a device's sensors are read: `power.meter` of its own configuration, or the first that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from client.power import linux, nvidia, pi, stated, supply, termux
from client.power.conditions import Conditions, cached_for, combined
from client.power.meter import EnergySource
from client.power.rapl import RaplCounters
from client.power.system import System
from common.errors import AntherError
from conf.schemas.node import PowerConfig

NONE = "none"
OWNER_SECONDS, NETWORK_SECONDS = 2.0, 30.0
"""For which whether somebody uses it, and its network, are taken for unchanged: each takes a command to read."""


@dataclass(frozen=True, kw_only=True)
class PowerSensors:
    """What is read on this device."""

    name: str
    """Of what measures its energy; `none`: nothing does."""
    covers: str
    """What that energy is of, for people."""
    read: Callable[[], Conditions]
    """What holds now. Raises AntherError where a file that was named in place of sensors can't be read."""
    source: EnergySource | None


def choose_sensors(power: PowerConfig, system: System | None = None, *, cuda: bool = False) -> PowerSensors:
    """The sensors of this device.

    Args:
        system: where they are looked for; None: here.
        cuda: training is done on an NVIDIA board, so that its energy is the board's.

    Raises:
        AntherError: the meter that was asked for measures nothing here.
    """
    system = system or System()
    if power.meter == "file":
        return _of_file(Path(str(power.file)).expanduser(), system)
    source = None if power.meter == NONE else _source(power.meter, system, cuda=cuda)
    if power.meter not in (NONE, "auto") and source is None:
        raise AntherError(f"power.meter={power.meter}: it measures nothing on this device{_hint(power.meter)}")
    return PowerSensors(
        name=source.name if source else NONE,
        covers=source.covers if source else "not measured here; estimated as seconds times power.watts",
        read=reader(system, cuda=cuda),
        source=source,
    )


def reader(system: System, *, cuda: bool = False) -> Callable[[], Conditions]:
    """Reads all that this device tells of itself; commands that it lacks are never called."""
    parts: list[Callable[[], Conditions]] = [partial(read, system) for read in (supply.supply, linux.heat)]
    if system.has("vcgencmd"):
        parts.append(partial(pi.slowed, system))
    if system.has(termux.BATTERY):
        parts.append(partial(termux.battery, system))
    if cuda and system.has(nvidia.QUERY[0]):
        parts.append(partial(nvidia.boards, system))
    if system.has("busctl"):
        parts.append(cached_for(partial(linux.owner, system), OWNER_SECONDS))
        parts.append(cached_for(partial(linux.network, system), NETWORK_SECONDS))
    if system.has(termux.WIFI):
        parts.append(cached_for(partial(termux.network, system), NETWORK_SECONDS))
    parts.append(partial(linux.memory, system))
    return lambda: combined(*(part() for part in parts))


def _of_file(file: Path, system: System) -> PowerSensors:
    """What a file says in place of sensors, but for memory, which it needn't know."""
    first = stated.stated(file)  # a mistake in it is better known at once

    def watts() -> float | None:
        return stated.stated(file).watts

    source = None
    if first.watts is not None:
        source = EnergySource(name="file", covers=stated.COVERS, read=watts, quality=first.watts_quality)
    return PowerSensors(
        name="file" if source else NONE,
        covers=stated.COVERS,
        read=lambda: combined(stated.stated(file), linux.memory(system)),
        source=source,
    )


def _source(meter: str, system: System, *, cuda: bool) -> EnergySource | None:
    """The meter of this name, if the device has it; for `auto` the first that gives a reading now."""
    makers: dict[str, Callable[[System], EnergySource]] = {
        "nvml": _nvml,
        "pi5": _pi5,
        "battery": _battery,
        "termux": _termux,
        "rapl": _rapl,
    }
    if meter == "auto":  # those that see most of the device first; a board that training leaves idle isn't one of them
        found = (make(system) for name, make in makers.items() if cuda or name != "nvml")
        return next((source for source in found if source.read() is not None), None)
    source = makers[meter](system)
    gauges = {"battery": supply.supply, "termux": termux.battery}
    if meter in gauges:  # it tells no watts while there is a charger
        return source if gauges[meter](system).battery is not None else None
    return source if source.read() is not None else None


def _nvml(system: System) -> EnergySource:
    return EnergySource(name="nvml", covers=nvidia.COVERS, read=lambda: nvidia.boards(system).watts)


def _pi5(system: System) -> EnergySource:
    return EnergySource(name="pi5", covers=pi.COVERS, read=partial(pi.watts, system))


def _battery(system: System) -> EnergySource:
    return EnergySource(name="battery", covers=supply.COVERS, read=lambda: supply.supply(system).watts)


def _termux(system: System) -> EnergySource:
    return EnergySource(name="termux", covers=termux.COVERS, read=lambda: termux.battery(system).watts)


def _rapl(system: System) -> EnergySource:
    counters = RaplCounters(system)
    return EnergySource(name="rapl", covers=counters.covers, read=counters, counts=True)


def _hint(meter: str) -> str:
    """What would help, where that is known."""
    return {
        "pi5": ": needs a Raspberry Pi 5, and `vcgencmd` allowed (group video)",
        "battery": ": needs a battery that the kernel tells of in /sys/class/power_supply",
        "rapl": ": its counters are root's; give this user /sys/class/powercap/intel-rapl:*/energy_uj to read",
        "nvml": ": needs NVIDIA's driver with nvidia-smi",
        "termux": ": needs the app Termux:API, and `pkg install termux-api`",
    }.get(meter, "")
