"""Schemas of a simulated fleet: device profiles, workload and virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schemas.checks import is_regex, none_or_positive, require


@dataclass
class ProfileConfig:
    """One kind of device. Values are estimates unless its file says otherwise. From `count` on, only fleet.timed reads
    them."""

    name: str = MISSING
    """Name of the kind."""
    uplink_mbps: float = MISSING
    """Uplink in Mbit/s."""
    downlink_mbps: float = MISSING
    """Downlink in Mbit/s."""
    metered: bool = False
    """Whether its link is metered (paid by volume)."""
    device: str | None = None
    """Hardware: a file name of conf/device; null: as stated by memory_gib, examples_per_second and watts."""
    memory_gib: float | None = None
    """Memory in GiB; null: that of its hardware."""
    examples_per_second: float | None = None
    """Training examples per second; null: predicted from its hardware."""
    measured_on: str | None = None
    """Base that examples_per_second was measured on, at its own resolution. For another base or resolution the rate is
    predicted from the hardware; null: it holds for every base."""
    watts: float | None = None
    """Power while training, in watts; null: that of its hardware."""
    max_rank: int | None = None
    """Highest rank that it trains; null: any."""
    sites: str | None = None
    """Layers that it trains, of those that have adapters: attention, linear, all, or a regular expression on their
    names; null: all."""
    count: int = 1
    """Devices of this kind in each turn of dealing profiles to writers."""
    charger_watts: float = 0.0
    """Power of its charger into the battery, in watts."""
    plugged_hours: list[float] = field(default_factory=lambda: [0.0, 24.0])
    """Intervals [start, end] in hours of the owner's clock when it is plugged in; an interval with end < start ends on
    the next day."""
    idle_hours: list[float] = field(default_factory=lambda: [0.0, 24.0])
    """Intervals [start, end] in hours of the owner's clock when the owner doesn't use it."""
    interruptible: bool = False
    """Whether it aborts its work when the owner unplugs it or begins to use it."""
    dropout_per_hour: float = 0.0
    """Probability per hour of work that it drops out, without a modeled cause."""
    throttle_after: float | None = None
    """Seconds of work until it is hot; null: never."""
    cooldown: float = 600.0
    """Seconds of rest until it is cool again."""
    throttled_speed: float = 1.0
    """Fraction of full speed while it is hot."""

    def __post_init__(self) -> None:
        for name in ("memory_gib", "examples_per_second", "watts"):
            value = getattr(self, name)
            self._require(none_or_positive(value), f"{name}={value}", "must be over 0")
            self._require(value is not None or self.device is not None, name, "state it, or name its hardware (device)")
        measured = self.measured_on is None or self.device is not None
        self._require(measured, f"measured_on={self.measured_on}", "name its hardware too (device)")
        for name in ("uplink_mbps", "downlink_mbps", "count", "cooldown", "throttled_speed"):
            value = getattr(self, name)
            self._require(value == MISSING or value > 0, f"{name}={value}", "must be over 0")
        self._require(none_or_positive(self.max_rank), f"max_rank={self.max_rank}", "must be 1 or more, or null")
        self._require(self.sites is None or is_regex(self.sites), f"sites={self.sites}", "not a regular expression")
        for name in ("plugged_hours", "idle_hours"):
            hours = getattr(self, name)
            pairs = len(hours) % 2 == 0 and all(0 <= hour <= 24 for hour in hours)
            self._require(pairs, f"{name}={hours}", "must be pairs [start, end] of hours, 0 to 24")
        for name, maximum in (("dropout_per_hour", 1.0), ("throttled_speed", 1.0), ("charger_watts", 1e4)):
            value = getattr(self, name)
            self._require(0 <= value <= maximum, f"{name}={value}", f"must be 0 to {maximum:g}")
        self._require(self.dropout_per_hour < 1, f"dropout_per_hour={self.dropout_per_hour}", "must be under 1")
        hot = self.throttle_after
        self._require(none_or_positive(hot), f"throttle_after={hot}", "must be over 0, or null")

    def _require(self, condition: bool, setting: str, mend: str) -> None:
        require(condition, f"fleet.profiles: {setting} of {self.name}: {mend}")


@dataclass
class WorkloadConfig:
    """Scale of a simulated device's costs, as if the base were a larger one."""

    memory_factor: float = 1.0
    """Factor on the memory of a pass, beyond that of an idle process."""
    compute_factor: float = 1.0
    """Factor on the operations and the memory traffic of a pass."""

    def __post_init__(self) -> None:
        for name in ("memory_factor", "compute_factor"):
            value = getattr(self, name)
            require(value > 0, f"fleet.workload.{name}={value}: must be over 0")


@dataclass
class FleetConfig:
    """The simulated devices."""

    profiles: list[ProfileConfig] = MISSING
    """Kinds of devices, dealt to the writers in turn."""
    timed: bool = False
    """Simulate devices on a virtual clock: work takes time, memory and battery, and heats the device."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    timezone_spread: float = 0.0
    """Largest difference between owners' clocks in hours (timed fleets)."""
    schedule_jitter: float = 1.0
    """Largest difference between an owner's days in hours (timed fleets)."""
    trace: str | None = None
    """CSV or JSON file of the times when devices are plugged in and idle, instead of the profiles' hours."""

    def __post_init__(self) -> None:
        require(len(self.profiles) > 0, "fleet.profiles is empty: name at least one kind of device")
        for name, maximum in (("timezone_spread", 24.0), ("schedule_jitter", 12.0)):
            value = getattr(self, name)
            require(0 <= value <= maximum, f"fleet.{name}={value}: must be 0 to {maximum:g} hours")
        for profile in self.profiles if self.timed else ():
            mend = "set device to the name of a file of conf/device"
            require(profile.device is not None, f"fleet.timed: {profile.name} names no hardware: {mend}")
        require(self.trace is None or self.timed, f"fleet.trace={self.trace}: requires fleet.timed=true")
