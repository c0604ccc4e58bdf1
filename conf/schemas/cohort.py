"""Schemas of a round's cohort: its size, and the eligibility of devices."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schemas.checks import none_or_positive, require


@dataclass
class EligibilityConfig:
    """Conditions on a device that is asked to train; by default none."""

    idle: bool = False
    """Require that the owner isn't using the device."""
    min_battery: float | None = None
    """Minimum charge, as a fraction of a full battery, of a device that isn't charging; null: any."""
    cool: bool = False
    """Require that the device isn't hot."""
    unmetered: bool = False
    """Require a link that isn't paid by volume."""
    min_memory_gib: float | None = None
    """Minimum memory in GiB; null: any."""
    has_pictures: bool = False
    """Require pictures on the device."""

    def __post_init__(self) -> None:
        battery, memory = self.min_battery, self.min_memory_gib
        key = f"cohort.eligibility.min_battery={battery}"
        require(battery is None or 0 < battery <= 1, f"{key}: must be over 0 and at most 1, or null")
        require(none_or_positive(memory), f"cohort.eligibility.min_memory_gib={memory}: must be over 0, or null")


@dataclass
class CohortConfig:
    """The devices of one round; every round draws new ones."""

    size: int | None = None
    """Devices asked to train per round; null: all."""
    sampling_rate: float | None = None
    """Instead of size: probability with which each device is asked, independently and in secret (Poisson sampling)."""
    eval_size: int | None = None
    """Devices asked to evaluate each round's adapter; null: as size."""
    overselection: float = 1.0
    """Factor on size for the number of devices asked; the first `size` replies end the round. A simulation needs a
    timed fleet for it."""
    eligibility: EligibilityConfig = field(default_factory=EligibilityConfig)
    max_state_age: float = 600.0
    """Age in seconds at which a device's state is requested again, if the state is used."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.size), f"cohort.size={self.size}: must be 1 or more, or null for all")
        require(none_or_positive(self.eval_size), f"cohort.eval_size={self.eval_size}: must be 1 or more, or null")
        require(self.max_state_age >= 0, f"cohort.max_state_age={self.max_state_age}: must be 0 or more")
        rate = f"cohort.sampling_rate={self.sampling_rate}"
        in_range = self.sampling_rate is None or 0 < self.sampling_rate <= 1
        require(in_range, f"{rate}: must be over 0 and at most 1, or null")
        one = self.sampling_rate is None or self.size is None
        require(one, f"{rate} cohort.size={self.size}: choose one of them")
        over = f"cohort.overselection={self.overselection}"
        require(1 <= self.overselection <= 10, f"{over}: must be 1 to 10")
        require(self.overselection == 1 or self.size is not None, f"{over}: requires cohort.size")
