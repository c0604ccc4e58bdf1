"""A fleet that lives on a virtual clock, of devices without a base: for tests of rounds that take time.

One training example takes a device of speed 1 a second; a pass of rank r takes r MiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schemas.planning import DeviceProfile
from conf.schemas.simulation import Profile, Workload
from models.footprint.footprint import Footprint
from models.footprint.site_costs import PassCosts, SiteCost
from simulations.fleet.availability import Daily, Hours
from simulations.fleet.costs import Costs
from simulations.fleet.device_model import Body, Moment
from simulations.fleet.hardware import Hardware
from simulations.fleet.virtual_device import Owned
from simulations.fleet.virtual_fleet import Lives
from simulations.grid.timed import TimedGrid
from tests.helpers.fleet import FakeDevice, perform

COSTS = Costs(
    lambda rank: Footprint(base_bytes=rank << 20, matrix_operations=10**13),
    lambda: PassCosts(
        sites=(
            SiteCost(name="x", held_bytes=2 << 20, own_bytes=1 << 20, work=0.6, own_work=0.1),
            SiteCost(name="y", held_bytes=1 << 20, own_bytes=1 << 20, work=0.2, own_work=0.1),
        )
    ),
    Workload(),
)
ALWAYS = Daily([0.0, 24.0], [0.0, 24.0])
RUNTIME = 256.0  # MiB


def owned(
    name: str,
    *,
    speed: float = 1.0,
    memory_mib: float = 1024.0,
    battery_wh: float | None = None,
    charge: float = 0.0,
    hours: Hours = ALWAYS,
    **profile: Any,
) -> Owned:
    """A device; links take a second for 125 kB unless `uplink_mbps` or `downlink_mbps` say otherwise."""
    kind = Profile(name="p", device="p", **{"uplink_mbps": 1.0, "downlink_mbps": 1.0} | profile)
    device = DeviceProfile(
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
    return Owned(name=name, hardware=found, body=Body.of(kind, device), hours=hours, moment=Moment(0.0, charge))


def timed(folder: Path, *fleet: Owned, devices: list[FakeDevice] | None = None, perform: Any = perform, **more: Any):
    """The grid of a fleet, and its lives."""
    lives = Lives(folder / "fleet", {each.name: each for each in fleet})
    found = devices or [FakeDevice(each.name) for each in fleet]
    return TimedGrid(found, perform, lives=lives, costs=COSTS, seed=more.pop("seed", 0)), lives  # type: ignore[arg-type]
