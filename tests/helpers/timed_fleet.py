"""Timed fleet of fake devices without a base, for tests of rounds that take time.

At speed 1, a training example takes one second. A pass of rank r takes r MiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schemas.fleet import ProfileConfig, WorkloadConfig
from conf.schemas.planning import DeviceProfileConfig
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


def virtual_device(
    name: str,
    *,
    speed: float = 1.0,
    memory_mib: float = 1024.0,
    battery_wh: float | None = None,
    charge: float = 0.0,
    availability: Availability = ALWAYS,
    **profile: Any,
) -> VirtualDevice:
    """Build a device; its links transfer 125 kB a second unless `uplink_mbps` or `downlink_mbps` is given."""
    profile_config = ProfileConfig(name="p", device="p", **{"uplink_mbps": 1.0, "downlink_mbps": 1.0} | profile)
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
    return VirtualDevice(
        name=name,
        hardware=Hardware(profile_config, device.memory_gib, speed, device.watts_busy, device),
        power_model=PowerModel.of(profile_config, device),
        availability=availability,
        state=DeviceState(0.0, charge),
    )


def timed_grid(
    folder: Path,
    *virtual_devices: VirtualDevice,
    devices: list[FakeDevice] | None = None,
    perform: Any = perform,
    seed: int = 0,
):
    """Return the grid of these devices, and the fleet."""
    fleet = VirtualFleet(folder / "fleet", {device.name: device for device in virtual_devices})
    clients = devices or [FakeDevice(device.name) for device in virtual_devices]
    return TimedGrid(clients, perform, fleet=fleet, costs=COSTS, seed=seed), fleet  # type: ignore[arg-type]
