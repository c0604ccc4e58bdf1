"""Hardware of the fleet's profiles: stated in the profile, or else taken from `conf/device` and predicted.

A stated rate is that of one base (`measured_on`). For other bases the rate is predicted as in `anther device plan`:
operations of a training pass at the run's resolution over the device's sustained speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from common.errors import AntherError
from conf.schemas.fleet import FleetConfig, ProfileConfig
from conf.schemas.planning import DeviceProfileConfig, device_profile
from models.base.base import Base
from models.files import assets
from protocol.messages import TrainingPlan
from simulations.fleet.costs import Costs


@dataclass(frozen=True)
class Hardware:
    """Memory, speed and power of one kind of device."""

    profile: ProfileConfig
    memory_gib: float
    examples_per_second: float
    """Rate at full speed for the plan of an unconstrained device."""
    watts: float
    device: DeviceProfileConfig | None = None
    """Description of the hardware; None: only the fields above are known."""
    stated_rank: int | None = None
    """Rank of the plan for which the profile states its rate; None: the rate is predicted."""

    def seconds(self, plan: TrainingPlan, costs: Costs) -> float:
        """Return the seconds of all steps of a plan at full speed, as predicted or by the stated rate."""
        predicted = costs.seconds(plan, self.known_device)
        if self.stated_rank is None:
            return predicted
        return predicted / (self.examples_per_second * costs.example_seconds(self.stated_rank, self.known_device))

    @property
    def predicted(self) -> bool:
        """Whether the rate is predicted rather than stated in the profile."""
        return self.stated_rank is None

    @property
    def known_device(self) -> DeviceProfileConfig:
        """The hardware description; ValueError if it is not known."""
        if self.device is None:
            raise ValueError(f"{self.profile.name}: its hardware is not known")
        return self.device


def profile_cycle(fleet: FleetConfig) -> list[ProfileConfig]:
    """Return the profiles in the order in which they are assigned to devices, repeated cyclically."""
    return [profile for profile in fleet.profiles for _ in range(profile.count)]


def build_hardware(fleet: FleetConfig, costs: Costs, rank: int, base: Base | None = None) -> list[Hardware]:
    """Build the hardware of every profile of the cycle.

    Args:
        fleet: configuration of the fleet.
        costs: predicted costs of the run's base.
        rank: rank in the plan of an unconstrained device.
        base: base of the run; None: the base on which every stated rate was measured.

    Raises:
        AntherError: a profile names an unknown device.
    """

    @cache
    def build(index: int) -> Hardware:
        return _build(fleet.profiles[index], costs, rank, base)

    return [build(fleet.profiles.index(profile)) for profile in profile_cycle(fleet)]


def _build(profile: ProfileConfig, costs: Costs, rank: int, base: Base | None) -> Hardware:
    memory, rate, watts = profile.memory_gib, profile.examples_per_second, profile.watts
    if profile.device is None:
        if memory is None or rate is None or watts is None:
            raise ValueError("a profile needs memory_gib, examples_per_second and watts, or device")
        return Hardware(profile, memory, rate, watts, stated_rank=rank)
    try:
        device = device_profile(profile.device)
    except AntherError as error:
        raise AntherError(f"fleet.profiles: {profile.name}: {error}") from None
    device = replace(device, memory_gib=memory or device.memory_gib, watts_busy=watts or device.watts_busy)
    if rate is not None and _rate_applies(profile, base):
        return Hardware(profile, device.memory_gib, rate, device.watts_busy, device, stated_rank=rank)
    return Hardware(profile, device.memory_gib, 1.0 / costs.example_seconds(rank, device), device.watts_busy, device)


def _rate_applies(profile: ProfileConfig, base: Base | None) -> bool:
    """Return whether the stated rate of a profile holds for this base at this resolution."""
    if profile.measured_on is None or base is None:
        return True
    return base.resolution == base.native_resolution and assets.matches_hash(profile.measured_on, base.hash)
