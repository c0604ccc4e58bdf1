"""The hardware of a fleet's profiles: what their files state, and for the rest what conf/device says and predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from conf.errors import AntherError
from conf.planning import DeviceProfile, device_profile
from conf.schemas import Fleet, Profile
from protocol.messages import TrainingPlan
from simulations.costs import Costs


@dataclass(frozen=True)
class Hardware:
    """One kind of device of a fleet: its memory, its speed, its power."""

    profile: Profile
    memory_gib: float
    examples_per_second: float
    """Of the plan that a device without limits gets, at full speed."""
    watts: float
    device: DeviceProfile | None = None
    """None: nothing but the above is known."""
    pace: float = 1.0
    """Seconds that it really takes over those that are predicted: where its file states a rate."""

    def seconds(self, plan: TrainingPlan, costs: Costs) -> float:
        """Of all steps of a plan, at full speed."""
        return self.pace * costs.seconds(plan, self.known)

    @property
    def known(self) -> DeviceProfile:
        """Its device; ValueError if that is not known."""
        if self.device is None:
            raise ValueError(f"{self.profile.name}: its hardware is not known")
        return self.device


def turn(fleet: Fleet) -> list[Profile]:
    """The profiles in the order in which they are dealt, one for each device, again and again."""
    return [profile for profile in fleet.profiles for _ in range(profile.share)]


def hardware(fleet: Fleet, costs: Costs, rank: int) -> list[Hardware]:
    """Of every profile of the turn; AntherError if one names a device that isn't there.

    Args:
        rank: of the plan that a device without limits gets.
    """

    @cache
    def of(place: int) -> Hardware:
        return _hardware(fleet.profiles[place], costs, rank)

    return [of(fleet.profiles.index(profile)) for profile in turn(fleet)]


def _hardware(profile: Profile, costs: Costs, rank: int) -> Hardware:
    memory, rate, watts = profile.memory_gib, profile.examples_per_second, profile.watts
    if profile.device is None:
        if memory is None or rate is None or watts is None:
            raise ValueError("a profile states these or names a device")
        return Hardware(profile, memory, rate, watts)
    try:
        device = device_profile(profile.device)
    except AntherError as error:
        raise AntherError(f"fleet.profiles: {profile.name}: {error}") from None
    device = replace(device, memory_gib=memory or device.memory_gib, watts_busy=watts or device.watts_busy)
    predicted = 1.0 / costs.example_seconds(rank, device)
    rate = rate or predicted
    return Hardware(profile, device.memory_gib, rate, device.watts_busy, device, predicted / rate)
