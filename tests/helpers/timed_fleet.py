"""A fleet that lives on a virtual clock, of devices without a base: for tests of rounds that take time.

One training example takes a device of speed 1 a second; a pass of rank r takes r MiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schemas.planning import DeviceProfileConfig
from conf.schemas.simulation import ProfileConfig, WorkloadConfig
from models.footprint.footprint import Footprint
from models.footprint.site_costs import PassCosts, SiteCost
from simulations.fleet.availability import Availability, DailySchedule
from simulations.fleet.costs import Costs
from simulations.fleet.device_model import DeviceState, PowerModel
from simulations.fleet.hardware import Hardware
from simulations.fleet.virtual_device import VirtualDevice
from simulations.fleet.virtual_fleet import VirtualFleet
from simulations.grid.timed import TimedGrid
from tests.helpers.fleet import FakeDevice, perform

COSTS = Costs(
    lambda rank: Footprint(base_bytes=rank << 20, matrix_operations=10**13),
    lambda: PassCosts(
        sites=(
            SiteCost(name="x", peak_bytes=2 << 20, site_bytes=1 << 20, work=0.6, site_work=0.1),
            SiteCost(name="y", peak_bytes=1 << 20, site_bytes=1 << 20, work=0.2, site_work=0.1),
        )
    ),
    WorkloadConfig(),
)
ALWAYS = DailySchedule([0.0, 24.0], [0.0, 24.0])
RUNTIME = 256.0  # MiB


def owned(
    name: str,
    *,
    speed: float = 1.0,
    memory_mib: float = 1024.0,
    battery_wh: float | None = None,
    charge: float = 0.0,
    hours: Availability = ALWAYS,
    **profile: Any,
) -> VirtualDevice:
    """A device; links take a second for 125 kB unless `uplink_mbps` or `downlink_mbps` say otherwise."""
    kind = ProfileConfig(name="p", device="p", **{"uplink_mbps": 1.0, "downlink_mbps": 1.0} | profile)
    device = DeviceProfileConfig(
        name="p",
        memory_gib=memory_mib / 1024,
        runtime_mib=RUNTIME,
        matrix_gflops=1e4 * speed,
        convolution_gflops=1.0,
        bandwidth_gbs=1.0,
        watts_idle=1.0,
        watts_busy=5.0,
        battery_wh=battery_wh,
    )
    found = Hardware(kind, device.memory_gib, speed, device.watts_busy, device)
    return VirtualDevice(
        name=name, hardware=found, body=PowerModel.of(kind, device), hours=hours, state=DeviceState(0.0, charge)
    )


def timed(
    folder: Path, *fleet: VirtualDevice, devices: list[FakeDevice] | None = None, perform: Any = perform, **more: Any
):
    """The grid of a fleet, and its lives."""
    lives = VirtualFleet(folder / "fleet", {each.name: each for each in fleet})
    found = devices or [FakeDevice(each.name) for each in fleet]
    return TimedGrid(found, perform, lives=lives, costs=COSTS, seed=more.pop("seed", 0)), lives  # type: ignore[arg-type]
