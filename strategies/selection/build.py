"""Who trains and who measures, as a configuration has it."""

from __future__ import annotations

import math
from functools import partial

from common.errors import AntherError
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
    """Who is asked to train: everyone, `fleet.sample` of them by `selection`, or each by the probability `fleet.rate`.

    Args:
        seed: of the coins that this probability is tossed with; None: nobody can repeat them.

    Raises AntherError for a selection without what it goes by.
    """
    if config.selection.name != "sample" and config.fleet.sample is None:
        raise AntherError(f"selection={config.selection.name}: chooses the devices of a fleet.sample; give its size")
    if config.fleet.rate is not None:
        return Poisson(
            rate=config.fleet.rate, coins=partial(noise_source, purpose="selection", client="server", seed=seed)
        )
    chosen, deadline = config.selection, config.strategy.deadline
    if config.fleet.sample is None:
        return Everyone()
    size, oort = math.ceil(config.fleet.sample * config.fleet.overselect), OortSettings(**vars(chosen.oort))
    more, weight = chosen.more or 2.0, 0.25 if chosen.weight is None else chosen.weight
    match chosen.name:
        case "round_robin":
            return RoundRobin(size=size)
        case "oort":
            return Oort(size=size, seed=config.seed, settings=oort)
        case "energy":
            return Energy(size=size, seed=config.seed, weight=weight, settings=oort)
        case "deadline":
            if deadline is None:
                raise AntherError("selection=deadline: there is none; give strategy.deadline")
            return Deadline(size=size, seconds=deadline, more=more, seed=config.seed)
        case "loss_fair":
            return PowerOfChoice(size=size, more=more, seed=config.seed)
        case "thrifty":
            return EnergyDelay(size=size, more=more, seed=config.seed)
        case "sample":
            return Sample(size=size, seed=config.seed)
    raise AntherError(f"selection={chosen.name}: nothing here makes it; known are {', '.join(SELECTIONS)}")


def evaluation(config: SimulationConfig) -> NameSelection:
    """Who measures: as many as `fleet.evaluate`, else as `fleet.sample`; all if neither is given.

    The same every round. Under privacy others every round, since each measurement is charged to whoever makes it.
    """
    size = config.fleet.sample if config.fleet.evaluate is None else config.fleet.evaluate
    if size is None or config.privacy.level != NONE:
        return Everyone() if size is None else Sample(size=size, seed=config.seed, purpose="evaluation")
    return FixedPanel(size=size, seed=config.seed)
