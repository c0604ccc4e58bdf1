"""The hardware of a fleet's profiles: what their files state, and for the rest what conf/device says and predicts.

A rate that a file states is that of one base (`measured_on`). For others it is predicted, as `client.cli.plan` does: the
operations of a training pass at the run's resolution, over what the device's hardware sustains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from common.errors import AntherError
from conf.schemas.planning import DeviceProfileConfig, device_profile
from conf.schemas.simulation import FleetConfig, ProfileConfig
from models.base import assets
from models.base.base import Base
from protocol.messages import TrainingPlan
from simulations.fleet.costs import Costs


@dataclass(frozen=True)
class Hardware:
    """One kind of device of a fleet: its memory, its speed, its power."""

    profile: ProfileConfig
    memory_gib: float
    examples_per_second: float
    """Of the plan that a device without limits gets, at full speed."""
    watts: float
    device: DeviceProfileConfig | None = None
    """None: nothing but the above is known."""
    stated_at: int | None = None
    """Rank of the plan whose rate its file states; None: its rate is predicted."""

    def seconds(self, plan: TrainingPlan, costs: Costs) -> float:
        """Of all steps of a plan, at full speed: as predicted, or by the rate that its file states."""
        found = costs.seconds(plan, self.known)
        if self.stated_at is None:
            return found
        return found / (self.examples_per_second * costs.example_seconds(self.stated_at, self.known))

    @property
    def predicted(self) -> bool:
        """Whether its rate is, rather than stated by its file."""
        return self.stated_at is None

    @property
    def known(self) -> DeviceProfileConfig:
        """Its device; ValueError if that is not known."""
        if self.device is None:
            raise ValueError(f"{self.profile.name}: its hardware is not known")
        return self.device


def turn(fleet: FleetConfig) -> list[ProfileConfig]:
    """The profiles in the order in which they are dealt, one for each device, again and again."""
    return [profile for profile in fleet.profiles for _ in range(profile.share)]


def hardware(fleet: FleetConfig, costs: Costs, rank: int, base: Base | None = None) -> list[Hardware]:
    """Of every profile of the turn; AntherError if one names a device that isn't there.

    Args:
        rank: of the plan that a device without limits gets.
        base: of the run; None: the one that every stated rate was measured on.
    """

    @cache
    def of(place: int) -> Hardware:
        return _hardware(fleet.profiles[place], costs, rank, base)

    return [of(fleet.profiles.index(profile)) for profile in turn(fleet)]


def _hardware(profile: ProfileConfig, costs: Costs, rank: int, base: Base | None) -> Hardware:
    memory, rate, watts = profile.memory_gib, profile.examples_per_second, profile.watts
    if profile.device is None:
        if memory is None or rate is None or watts is None:
            raise ValueError("a profile states these or names a device")
        return Hardware(profile, memory, rate, watts, stated_at=rank)
    try:
        device = device_profile(profile.device)
    except AntherError as error:
        raise AntherError(f"fleet.profiles: {profile.name}: {error}") from None
    device = replace(device, memory_gib=memory or device.memory_gib, watts_busy=watts or device.watts_busy)
    if rate is not None and _measured(profile, base):
        return Hardware(profile, device.memory_gib, rate, device.watts_busy, device, stated_at=rank)
    return Hardware(profile, device.memory_gib, 1.0 / costs.example_seconds(rank, device), device.watts_busy, device)


def _measured(profile: ProfileConfig, base: Base | None) -> bool:
    """Whether the rate that a profile states is that of this base, at this resolution."""
    if profile.measured_on is None or base is None:
        return True
    return base.resolution == base.native_resolution and assets.matches_hash(profile.measured_on, base.hash)
