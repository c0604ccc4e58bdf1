"""Selections of a configuration: the devices that train, and those that evaluate."""

from __future__ import annotations

import math
from functools import partial

from common.errors import AntherError
from conf.schemas.cohort import OortConfig
from conf.schemas.simulation import SimulationConfig
from privacy.noise import noise_source
from strategies.registry import NONE, SELECTIONS
from strategies.selection import NameSelection, Selection
from strategies.selection.deadline import Deadline
from strategies.selection.eafl import EAFL
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.everyone import Everyone
from strategies.selection.fixed_panel import FixedPanel
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.poisson import Poisson
from strategies.selection.power_of_choice import PowerOfChoice
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample


def build_selection(config: SimulationConfig, seed: int | None) -> Selection:
    """Build the selection for training.

    It selects each device with probability `cohort.sampling_rate`, or `cohort.size` devices by `selection`, or all.

    Args:
        config: configuration of the run.
        seed: seed of Poisson sampling; None: randomness of the operating system, which can't be reproduced.

    Raises:
        AntherError: a setting that the selection needs is missing.
    """
    if config.selection.name != "random" and config.cohort.size is None:
        raise AntherError(f"selection={config.selection.name} requires cohort.size")
    if config.cohort.sampling_rate is not None:
        return Poisson(
            rate=config.cohort.sampling_rate,
            rng=partial(noise_source, purpose="selection", client="server", seed=seed),
        )
    settings, deadline = config.selection, config.planning.deadline
    if config.cohort.size is None:
        return Everyone()
    size, oort = math.ceil(config.cohort.size * config.cohort.overselection), _oort_settings(settings.oort)
    factor = settings.candidate_factor or 2.0
    weight = 0.25 if settings.utility_weight is None else settings.utility_weight
    match settings.name:
        case "round_robin":
            return RoundRobin(size=size)
        case "oort":
            return Oort(size=size, seed=config.seed, settings=oort)
        case "eafl":
            return EAFL(size=size, seed=config.seed, weight=weight, settings=oort)
        case "deadline":
            if deadline is None:
                raise AntherError("selection=deadline requires planning.deadline")
            return Deadline(size=size, seconds=deadline, candidate_factor=factor, seed=config.seed)
        case "power_of_choice":
            return PowerOfChoice(size=size, candidate_factor=factor, seed=config.seed)
        case "energy_delay":
            return EnergyDelay(size=size, candidate_factor=factor, seed=config.seed)
        case "random":
            return Sample(size=size, seed=config.seed)
    raise AntherError(
        f"selection={settings.name}: strategies/factory/selection.py does not create it; known are "
        f"{', '.join(SELECTIONS)}"
    )


def _oort_settings(oort: OortConfig) -> OortSettings:
    return OortSettings(
        alpha=oort.alpha,
        exploration=oort.exploration,
        exploration_decay=oort.exploration_decay,
        min_exploration=oort.min_exploration,
        cutoff=oort.cutoff,
        clip_quantile=oort.clip_quantile,
        duration_quantile=oort.duration_quantile,
        pacer_window=oort.pacer_window,
        pacer_step=oort.pacer_step,
        max_selections=oort.max_selections,
    )


def build_evaluation_selection(config: SimulationConfig) -> NameSelection:
    """Build the selection for evaluation: `cohort.eval_size` devices, else `cohort.size`, else all.

    The devices are the same in every round. Under privacy they change, since each evaluation is charged to its device.
    """
    size = config.cohort.size if config.cohort.eval_size is None else config.cohort.eval_size
    if size is None or config.privacy.level != NONE:
        return Everyone() if size is None else Sample(size=size, seed=config.seed, purpose="evaluation")
    return FixedPanel(size=size, seed=config.seed)
