"""Schemas of a round's cohort: its size, the eligibility of devices, and their selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class OortConfig:
    """Utility and exploration of Oort (OSDI 2021), for selection=oort and eafl."""

    alpha: float = 2.0
    """Exponent of the penalty on devices that are slower than the preferred duration."""
    exploration: float = 0.9
    """Fraction of the first round's devices that were never asked before."""
    exploration_decay: float = 0.98
    """Factor on that fraction in each round."""
    min_exploration: float = 0.3
    """Minimum of that fraction."""
    cutoff: float = 0.95
    """Devices with this fraction of the last selected device's utility may replace it."""
    clip_quantile: float = 0.9
    """Quantile at which utilities are clipped."""
    duration_quantile: float = 0.3
    """Initial quantile of the devices' round durations that is the preferred duration."""
    pacer_window: int = 20
    """Rounds between adjustments of that quantile by the pacer."""
    pacer_step: float = 0.05
    """Size of the pacer's adjustments."""
    max_selections: int | None = None
    """Rounds after which a device is left out while there are others; null: no limit."""

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"selection.oort.alpha={self.alpha}: must be 0 or more")
        fractions = (
            "exploration",
            "exploration_decay",
            "min_exploration",
            "cutoff",
            "clip_quantile",
            "duration_quantile",
            "pacer_step",
        )
        for name in fractions:
            value = getattr(self, name)
            require(0 < value <= 1, f"selection.oort.{name}={value}: must be over 0 and at most 1")
        require(self.pacer_window >= 1, f"selection.oort.pacer_window={self.pacer_window}: must be 1 or more")
        maximum = self.max_selections
        require(none_or_positive(maximum), f"selection.oort.max_selections={maximum}: must be 1 or more, or null")


@dataclass
class SelectionConfig:
    """Selection of the cohort.size devices of a round."""

    name: str = "random"
    """random, round_robin, oort, eafl, deadline, power_of_choice or energy_delay."""
    oort: OortConfig = field(default_factory=OortConfig)
    utility_weight: float | None = None
    """Weight of utility, against the battery that a round leaves (eafl), 0 to 1; null: 0.25."""
    candidate_factor: float | None = None
    """Candidates drawn per selected device (deadline, power_of_choice, energy_delay); the best are selected. null:
    2."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a plug-in's own."""

    def __post_init__(self) -> None:
        weight, factor = self.utility_weight, self.candidate_factor
        require(weight is None or 0 <= weight <= 1, f"selection.utility_weight={weight}: must be 0 to 1, or null")
        require(factor is None or factor >= 1, f"selection.candidate_factor={factor}: must be 1 or more, or null")
