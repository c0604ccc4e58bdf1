"""What a configuration is about: a base, people, and where their devices keep things; and who performs their jobs.

Each process of `grid=ray` makes the same world again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from conf.schemas.simulation import SimulationConfig
from models.base import base
from models.base.base import Base
from simulations.evaluation import Perform
from simulations.fleet.participants import Participant, own_pictures, participants
from simulations.fleet.storage import FILE, Database
from training.engine import perform


class SimulationSetup(NamedTuple):
    base: Base
    people: list[Participant]
    database: Database


def build(config: SimulationConfig, folder: Path) -> SimulationSetup:
    """The world of the run in `folder`; mistakes in pictures are told before the base is loaded."""
    own = own_pictures(config.data)
    frozen = base.load(
        config.base.path,
        sites=config.adapter.sites,
        weights=config.base.weights,
        device=config.base.device,
        compute=config.base.compute,
        checkpointing=config.base.checkpointing,
        resolution=config.base.resolution,
    )
    database = Database(folder / "devices" / FILE)
    return SimulationSetup(frozen, participants(config, frozen, database.device, own), database)


def performer(config: SimulationConfig, base: Base, memory: int) -> Perform:
    """Performs jobs on the base, in so many bytes."""
    timesteps, compiled = config.evaluation.timesteps, config.cohort.compiled
    return partial(perform, base, memory=memory, timesteps=timesteps, compiled=compiled)
