"""Choose the device's sensors: those named by `power.meter` in its configuration, or the first that work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from client.power import linux, nvidia, pi, stated, supply, termux
from client.power.conditions import Conditions, cached_for, combined
from client.power.meter import METERS, EnergySource
from client.power.system import System
from common.errors import AntherError
from conf.schemas.node import PowerConfig

NONE = "none"
OWNER_SECONDS, NETWORK_SECONDS = 2.0, 30.0
"""Seconds for which readings of the owner's activity and of the network are cached: each runs a command."""


@dataclass(frozen=True, kw_only=True)
class PowerSensors:
    """Sensors that are read on this device."""

    name: str
    """Name of the energy meter; `none`: nothing measures energy."""
    covers: str
    """Parts of the device whose energy is measured, as text for the owner."""
    read: Callable[[], Conditions]
    """Read the current conditions. Raises AntherError if a file that replaces the sensors can't be read."""
    source: EnergySource | None


def choose_sensors(power: PowerConfig, system: System | None = None, *, cuda: bool = False) -> PowerSensors:
    """Choose the sensors of this device.

    Args:
        power: the node's power configuration.
        system: files and commands of the system; None: this machine.
        cuda: training runs on an NVIDIA GPU, so its energy is the GPU's.

    Raises:
        AntherError: the configured meter measures nothing on this device.
    """
    system = system or System()
    if power.meter == "file":
        return _of_file(Path(str(power.file)).expanduser(), system)
    source = None if power.meter == NONE else _source(power.meter, system, cuda=cuda)
    if power.meter not in (NONE, "auto") and source is None:
        raise AntherError(
            f"power.meter={power.meter}: measures nothing on this device{METERS.lookup(power.meter).hint}"
        )
    return PowerSensors(
        name=source.name if source else NONE,
        covers=source.covers if source else "not measured here; estimated as seconds times power.watts",
        read=reader(system, cuda=cuda),
        source=source,
    )


def reader(system: System, *, cuda: bool = False) -> Callable[[], Conditions]:
    """Return a function that reads all sensors of this device; missing commands are never called."""
    parts: list[Callable[[], Conditions]] = [partial(sensor, system) for sensor in (supply.read_supply, linux.heat)]
    if system.has("vcgencmd"):
        parts.append(partial(pi.throttling, system))
    if system.has(termux.BATTERY):
        parts.append(partial(termux.read_battery, system))
    if cuda and system.has(nvidia.QUERY[0]):
        parts.append(partial(nvidia.read_gpus, system))
    if system.has("busctl"):
        parts.append(cached_for(partial(linux.owner, system), OWNER_SECONDS))
        parts.append(cached_for(partial(linux.network, system), NETWORK_SECONDS))
    if system.has(termux.WIFI):
        parts.append(cached_for(partial(termux.network, system), NETWORK_SECONDS))
    parts.append(partial(linux.memory, system))
    return lambda: combined(*(part() for part in parts))


def _of_file(file: Path, system: System) -> PowerSensors:
    """Read conditions from a file in place of sensors; only memory is still measured, so the file may omit it."""
    first = stated.read_stated(file)  # report a mistake in the file now rather than during training

    def watts() -> float | None:
        return stated.read_stated(file).watts

    source = None
    if first.watts is not None:
        source = EnergySource(name="file", covers=stated.COVERS, read=watts, quality=first.watts_quality)
    return PowerSensors(
        name="file" if source else NONE,
        covers=stated.COVERS,
        read=lambda: combined(stated.read_stated(file), linux.memory(system)),
        source=source,
    )


def _source(meter: str, system: System, *, cuda: bool) -> EnergySource | None:
    """Return the meter of this name, if the device has it; for `auto` the first that gives a reading now."""
    if meter == "auto":
        kinds = sorted(METERS.values(), key=lambda kind: kind.order)
        sources = (kind.make(system) for kind in kinds if cuda or not kind.cuda)
        return next((source for source in sources if source.read() is not None), None)
    return METERS.lookup(meter).source(system)
