"""Who trains and who measures, as a configuration has it."""

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
from strategies.selection.energy import Energy
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.everyone import Everyone
from strategies.selection.fixed_panel import FixedPanel
from strategies.selection.loss_fair import PowerOfChoice
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.poisson import Poisson
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample


def selection(config: SimulationConfig, seed: int | None) -> Selection:
    """Who is asked to train: everyone, `cohort.size` of them by `selection`, or each by the probability `cohort.sampling_rate`.

    Args:
        seed: of the coins that this probability is tossed with; None: nobody can repeat them.

    Raises AntherError for a selection without what it goes by.
    """
    if config.selection.name != "random" and config.cohort.size is None:
        raise AntherError(f"selection={config.selection.name}: chooses the devices of a cohort.size; give its size")
    if config.cohort.sampling_rate is not None:
        return Poisson(
            rate=config.cohort.sampling_rate,
            coins=partial(noise_source, purpose="selection", client="server", seed=seed),
        )
    chosen, deadline = config.selection, config.planning.deadline
    if config.cohort.size is None:
        return Everyone()
    size, oort = math.ceil(config.cohort.size * config.cohort.overselection), _oort_settings(chosen.oort)
    more = chosen.candidate_factor or 2.0
    weight = 0.25 if chosen.utility_weight is None else chosen.utility_weight
    match chosen.name:
        case "round_robin":
            return RoundRobin(size=size)
        case "oort":
            return Oort(size=size, seed=config.seed, settings=oort)
        case "eafl":
            return Energy(size=size, seed=config.seed, weight=weight, settings=oort)
        case "deadline":
            if deadline is None:
                raise AntherError("selection=deadline: there is none; give planning.deadline")
            return Deadline(size=size, seconds=deadline, more=more, seed=config.seed)
        case "power_of_choice":
            return PowerOfChoice(size=size, more=more, seed=config.seed)
        case "energy_delay":
            return EnergyDelay(size=size, more=more, seed=config.seed)
        case "random":
            return Sample(size=size, seed=config.seed)
    raise AntherError(f"selection={chosen.name}: nothing here makes it; known are {', '.join(SELECTIONS)}")


def _oort_settings(oort: OortConfig) -> OortSettings:
    return OortSettings(
        alpha=oort.alpha,
        exploration=oort.exploration,
        decay=oort.exploration_decay,
        least=oort.min_exploration,
        cutoff=oort.cutoff,
        clip=oort.clip_quantile,
        preferred=oort.duration_quantile,
        window=oort.pacer_window,
        step=oort.pacer_step,
        most=oort.max_selections,
    )


def evaluation(config: SimulationConfig) -> NameSelection:
    """Who measures: as many as `cohort.eval_size`, else as `cohort.size`; all if neither is given.

    The same every round. Under privacy others every round, since each measurement is charged to whoever makes it.
    """
    size = config.cohort.size if config.cohort.eval_size is None else config.cohort.eval_size
    if size is None or config.privacy.level != NONE:
        return Everyone() if size is None else Sample(size=size, seed=config.seed, purpose="evaluation")
    return FixedPanel(size=size, seed=config.seed)
