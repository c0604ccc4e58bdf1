"""Simulate a whole federation on one machine:  anther simulate [key=value …]

Composition root: configuration → base, fleet, strategy, grid → rounds → personal adapters → evaluation → report.
Finished rounds are on disk. After a kill at any time, `resume=true` continues after the last complete round, with the
same result. The exception are tasks of a timed fleet that were running when that round ended (asynchronous training,
late replies): they are lost, and the devices are asked again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

from common.imports import collection_paused
from conf.cli import drop_empty, hydra_application, output_dir, program
from conf.compose import compose
from conf.data_keys import refuse_other_data
from conf.overrides import quote
from conf.schemas.simulation import SimulationConfig
from simulations import run_dir
from simulations.checks import check_time, with_people_counted
from simulations.report.display import PERSONALIZING, TRAINING, Display, compare

if TYPE_CHECKING:
    from protocol.messages import TrainingPlan
    from server.rounds.state import Round, RunState
    from simulations.fleet.outcomes import FleetRound
    from simulations.fleet.participants import Participant
    from simulations.fleet.virtual_fleet import VirtualFleet
    from simulations.grid.cohort import Grid
    from strategies.strategy import FederatedStrategy


@dataclass(frozen=True)
class SimulationResult:
    """Results of a finished run."""

    folder: Path
    summary: dict[str, Any]
    """Contents of `summary.json`: mean losses by arm, bytes, ε, and so on."""

    @property
    def report(self) -> Path:
        """Path of the report page."""
        return self.folder / "report.html"

    @property
    def adapters(self) -> Path:
        """Folder of `shared.safetensors` and of the personal adapters."""
        return self.folder / "adapters"


_completed: list[tuple[list[str], SimulationResult]] = []
"""Overrides and result of each job of this command."""


def print_comparison() -> None:
    """Print the results of a multirun side by side."""
    if len(_completed) > 1:
        compare([(overrides, result.summary) for overrides, result in _completed])


@hydra_application("simulate", SimulationConfig, check=refuse_other_data, after=print_comparison)
def main(config: SimulationConfig) -> None:
    config = with_people_counted(config)
    folder, overrides = Path(output_dir()), list(HydraConfig.get().overrides.task)
    with Display(config.rounds) as display:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            display.say(f"run {HydraConfig.get().job.num}: {' '.join(overrides)}")
        try:
            result = simulate(config, folder, display=display, command=shlex.join([*_program(), *overrides]))
        except KeyboardInterrupt:
            display.interrupted(resume_command(overrides, folder) if run_dir.is_resumable(folder) else None)
            drop_empty(str(folder))
            raise
    _completed.append((overrides, result))


def simulate(
    config: SimulationConfig | str | Sequence[str],
    folder: str | Path,
    *,
    display: Display | None = None,
    command: str | None = None,
) -> SimulationResult:
    """Run or continue a federation.

    Args:
        config: a configuration, or command line words: `"rounds=3 privacy=example"`, or a list of them.
        folder: output folder; it must not contain another run.
        display: shows progress; None: nothing is shown.
        command: command that the report gives for repeating the run; None: derived from the words, or a call of this
            function.

    Raises:
        AntherError: a setting, a picture or the base can't be used, or the folder holds another run.
    """
    if not isinstance(config, SimulationConfig):
        words = shlex.split(config) if isinstance(config, str) else list(config)
        command = command or shlex.join([*_program(), *words])
        config = compose(words)
    config = with_people_counted(config)
    display = display or Display(config.rounds, console=Console(quiet=True))
    command = command or f"simulate(config, {str(folder)!r})"
    return _simulate(config, Path(folder), display, command)


def _simulate(config: SimulationConfig, folder: Path, display: Display, command: str) -> SimulationResult:
    started = time.perf_counter()
    check_time(config)
    record = run_dir.check(folder, config)
    reads = bool(config.data.pictures or config.data.path)
    display.phase("reading pictures and loading the base" if reads else "loading the base")
    if config.grid.name == "ray":
        from simulations.grid import ray  # before other imports of Flower, for which it sets environment variables

        ray.require()
    with collection_paused():
        from models.files import assets
        from privacy.storage import FileStorage
        from server.ledger import ServerLedger
        from server.rounds.federation import personalize_devices
        from simulations import setup
        from simulations.fleet import participants
        from simulations.fleet.virtual_fleet import build_virtual_fleet
        from simulations.grid.build import newcomers_grid, open_grid
        from simulations.report.run_work import run_work
        from strategies.factory.combination import check_configuration
        from strategies.factory.full_plan import training_plan
        from strategies.factory.strategy import build

    check_configuration(config)  # before the base is loaded
    display.work = run_work(config)
    base, people, database, newcomers = simulation = setup.build(config, folder)
    evaluated = participants.select_evaluated(people, config.evaluation.devices, config.data.evaluated_roles)
    run = record.get("config_hash") or run_dir.config_hash(config)
    plan = training_plan(config, run=run[:16], base=base.hash)
    fleet = (
        build_virtual_fleet(config.fleet, people, folder / "fleet", seed=config.seed) if config.fleet.timed else None
    )
    strategy = build(
        config,
        plan,
        base.sites,
        accept_simulated=True,
        ledger=ServerLedger(FileStorage(folder)),
        clock=fleet.clock if fleet else None,
        base=base,
        memory_factor=config.fleet.workload.memory_factor,
    )
    from training.capacity import budget, check_free

    memory = budget(config.trainer.memory_gib, base.device)
    check_free(memory, base.device)
    hashes = {"base": base.hash, "data": assets.digest(assets.locate("typefaces"))}
    if pictures_hash := participants.own_pictures_hash([*people, *newcomers]):
        hashes[run_dir.PICTURES] = pictures_hash
    memory = run_dir.claim(folder, config, hashes, memory=memory)  # last: all other checks have passed
    from simulations.report import results

    perform = setup.make_perform(config, base, memory)
    with open_grid(config, folder, simulation, perform, memory, fleet) as grid:
        state = federate(config, folder, strategy, plan, grid, people, evaluated, display, fleet)
    if newcomers:
        personalize_devices(config, grid=newcomers_grid(simulation, perform), strategy=strategy, plan=plan, state=state)
    fleet_rounds = fleet.log.rounds if fleet else ()
    summary = results.finish(
        config,
        folder,
        base,
        people,
        [*evaluated, *newcomers],
        perform,
        memory,
        state,
        display,
        started,
        command,
        fleet_rounds,
    )
    database.close()
    return SimulationResult(folder, summary)


def federate(
    config: SimulationConfig,
    folder: Path,
    strategy: FederatedStrategy,
    plan: TrainingPlan,
    grid: Grid,
    people: list[Participant],
    evaluated: list[Participant],
    display: Display,
    fleet: VirtualFleet | None,
) -> RunState:
    """Run all rounds, then train personal adapters on top of the best shared adapter on the evaluated devices.

    Args:
        config: configuration of the run.
        folder: its output folder, with the checkpoints of a run that is resumed.
        strategy: strategy of the run.
        plan: plan of an unconstrained device.
        grid: grid of all devices.
        people: participants of the rounds.
        evaluated: participants that get a personal adapter.
        display: shows each round.
        fleet: state of a timed fleet; None: devices answer at once.
    """
    from server.report.trackers import open_trackers
    from server.rounds import checkpoint
    from server.rounds.federation import federate

    saved = checkpoint.load(folder / "checkpoints", sites=strategy.format.sites)
    if fleet and saved:
        fleet.resume(saved.round)
    with open_trackers(folder, tensorboard=config.tracker.tensorboard) as tracker:

        def on_round(record: Round) -> None:
            values = _round_values(record, fleet.log.rounds[record.number] if fleet else None)
            tracker.log(record.number, values)
            if record.number:
                display.round({**values, "guarantees": record.guarantees})
            if record.number == config.rounds:
                display.phase(PERSONALIZING)

        for record in saved.history if saved else ():  # repeated: a kill may have come before its line was logged
            on_round(record)
        display.phase(TRAINING if saved is None or saved.round < config.rounds else PERSONALIZING)
        return federate(
            config,
            grid=grid,
            strategy=strategy,
            plan=plan,
            saved=saved,
            checkpoints=folder / "checkpoints",
            on_round=on_round,
            min_devices=0 if fleet else len(people),
            clock=fleet.clock if fleet else None,
            before_checkpoint=fleet.save if fleet else lambda _: None,
            personalized_devices={person.name for person in evaluated},
        )


def _round_values(record: Round, fleet: FleetRound | None) -> dict[str, Any]:
    """Return one round as flat numbers for trackers and the display; `fleet`: the outcomes of a timed fleet."""
    from server.report.trackers import round_metrics

    values, train = round_metrics(record), record.train
    if fleet:
        values |= {
            "hours": fleet.ended / 3600,
            "fleet_joules": fleet.joules,
            "battery_joules": fleet.drained,
            "lost": sum(fleet.lost.values()),
        }
        values |= {f"lost/{cause}": count for cause, count in fleet.lost.items()}
        values["late"] = train.dropped.get("late", 0) if train else 0
    return values


def resume_command(overrides: Sequence[str], folder: Path) -> str:
    """Return the command that continues a run, quoted for Hydra and the shell.

    Args:
        overrides: overrides with which it was started.
        folder: its output folder.
    """
    unchanged = [word for word in overrides if not word.startswith(("resume=", "hydra.run.dir="))]
    return shlex.join([*_program(), *unchanged, f"hydra.run.dir={quote(str(folder))}", "resume=true"])


def _program() -> list[str]:
    return program("simulations.run")


if __name__ == "__main__":
    main()
