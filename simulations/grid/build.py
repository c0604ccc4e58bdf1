"""Create the grid of a run's devices from its configuration."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from conf.schemas.simulation import SimulationConfig
from simulations.evaluation import Perform
from simulations.fleet.costs import build_costs
from simulations.fleet.virtual_fleet import VirtualFleet
from simulations.grid.cohort import CohortGrid, Grid
from simulations.grid.timed import TimedGrid
from simulations.setup import SimulationSetup


def open_grid(
    config: SimulationConfig,
    folder: Path,
    simulation: SimulationSetup,
    perform: Perform,
    memory: int,
    fleet: VirtualFleet | None,
) -> AbstractContextManager[Grid]:
    """Return the grid of the devices as a context manager.

    Args:
        config: configuration of the run.
        folder: its output folder.
        simulation: base, participants and storage.
        perform: runs jobs in this process.
        memory: bytes that jobs may take.
        fleet: state of a timed fleet; None: devices answer at once.
    """
    if config.grid.name == "ray":
        from simulations.grid.ray import ray_grid  # sets environment variables of Flower and Ray

        count, device = len(simulation.people), simulation.base.device.type
        return ray_grid(config, folder, devices=count, device=device, memory=memory)
    devices, batched = [person.device for person in simulation.people], config.grid.name == "cohort"
    group_commit = simulation.database.group_commit
    if fleet:
        return nullcontext(
            TimedGrid(
                devices,
                perform,
                fleet=fleet,
                costs=build_costs(simulation.base, config.base, config.fleet.workload, rank=config.adapter.shared.rank),
                seed=config.seed,
                batched=batched,
                group_commit=group_commit,
            )
        )
    return nullcontext(CohortGrid(devices, perform, batched=batched, group_commit=group_commit))


def newcomers_grid(simulation: SimulationSetup, perform: Perform) -> Grid:
    """Return the grid of the people who join after the rounds, whose nodes differ from those of the participants."""
    return CohortGrid(
        [person.device for person in simulation.newcomers],
        perform,
        group_commit=simulation.database.group_commit,
        first_node=len(simulation.people) + 1,
    )
