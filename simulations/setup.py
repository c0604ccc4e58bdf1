"""Base, participants and storage of a simulation, built from its configuration.

Each process of `grid=ray` builds them again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.plugins import allow_installed_plugins
from conf.schemas.simulation import SimulationConfig
from models.base import base
from models.base.base import Base
from simulations.evaluation import Perform
from simulations.fleet.participants import Participant, load_pictures, newcomers, participants
from simulations.fleet.storage import FILE, Database
from training.engine import perform


class SimulationSetup(NamedTuple):
    """Base, participants of the rounds, the database of their devices, and people who join after the rounds."""

    base: Base
    people: list[Participant]
    database: Database
    newcomers: list[Participant]


def build(config: SimulationConfig, folder: Path) -> SimulationSetup:
    """Build the setup of the run in `folder`; errors in pictures are reported before the base is loaded."""
    allow_installed_plugins()
    people = load_pictures(config.data)
    loaded = base.load(
        config.base.path,
        sites=config.adapter.sites,
        weights=config.base.weights,
        device=config.base.device,
        compute=config.base.compute_dtype,
        checkpointing=config.base.gradient_checkpointing,
        resolution=config.base.resolution,
    )
    database = Database(folder / "devices" / FILE)
    members = participants(config, loaded, database.device, people)
    return SimulationSetup(loaded, members, database, newcomers(config, loaded, database.device, people))


def make_perform(config: SimulationConfig, base: Base, memory: int) -> Perform:
    """Return a function that runs jobs on the base.

    Args:
        config: configuration of the run.
        base: base of the run.
        memory: bytes that jobs may take.
    """
    timesteps, compiled = config.evaluation.timesteps, config.trainer.compile
    return partial(perform, base, memory=memory, timesteps=timesteps, compiled=compiled)
