"""A whole federation on one machine:  anther simulate [key=value …]

Composition root: configuration → base, fleet, strategy, grid → rounds → personal adapters → evaluation → report.
Whatever is finished is on disk; killed at any moment, `resume=true` continues after the last whole round. It comes to
the same result, but for what devices of a timed fleet were still at when that round ended (asynchronous training, and
replies that would have come late): this is lost, and devices are asked anew.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

from common.errors import AntherError
from conf.cli import drop_empty, hydra_application, output_dir, program
from conf.compose import compose
from conf.overrides import quote
from conf.schemas.simulation import SimulationConfig
from simulations import run_dir
from simulations.report.display import Display, compare
from simulations.report.time_left import after_rounds

if TYPE_CHECKING:
    from protocol.messages import TrainingPlan
    from server.rounds.state import Round, RunState
    from simulations.evaluation import Perform
    from simulations.fleet.outcomes import FleetRound
    from simulations.fleet.participants import Participant
    from simulations.fleet.virtual_fleet import VirtualFleet
    from simulations.grid.cohort import Grid
    from simulations.setup import SimulationSetup
    from strategies.strategy import Federated


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]
    """As in `summary.json`: mean losses by arm, bytes, ε, and so on."""

    @property
    def report(self) -> Path:
        """The page that shows it."""
        return self.folder / "report.html"

    @property
    def adapters(self) -> Path:
        """The folder of `shared.safetensors` and each person's own."""
        return self.folder / "adapters"


_finished: list[tuple[list[str], Result]] = []
"""Overrides and result of each job of this command."""


def across() -> None:
    """Print the results of a multirun side by side."""
    if len(_finished) > 1:
        compare([(overrides, result.summary) for overrides, result in _finished])


@hydra_application("simulate", SimulationConfig, after=across)
def main(config: SimulationConfig) -> None:
    folder, overrides = Path(output_dir()), list(HydraConfig.get().overrides.task)
    with Display(config.rounds, after=after_rounds(config)) as display:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            display.say(f"run {HydraConfig.get().job.num}: {' '.join(overrides)}")
        try:
            result = simulate(config, folder, display=display, command=shlex.join([*_program(), *overrides]))
        except KeyboardInterrupt:
            display.stopped(resume_command(overrides, folder) if run_dir.begun(folder) else None)
            drop_empty(str(folder))
            raise
    _finished.append((overrides, result))


def simulate(
    config: SimulationConfig | str | Sequence[str],
    folder: str | Path,
    *,
    display: Display | None = None,
    command: str | None = None,
) -> Result:
    """Run or continue a federation.

    Args:
        config: a configuration, or the words of a command line: `"rounds=3 privacy=example"`, or a list of them.
        folder: what the run leaves comes here; it must not hold another run.
        display: shows progress; None: nothing is shown.
        command: how the report says that the run was started; None: by the words, or as a call of this function.

    Raises:
        AntherError: a setting, a picture or the base can't be used, or the folder is another run's.
    """
    if not isinstance(config, SimulationConfig):
        words = shlex.split(config) if isinstance(config, str) else list(config)
        command = command or shlex.join([*_program(), *words])
        config = compose(words)
    display = display or Display(config.rounds, console=Console(quiet=True))
    command = command or f"simulate(config, {str(folder)!r})"
    return _simulate(config, Path(folder), display, command)


def _simulate(config: SimulationConfig, folder: Path, display: Display, command: str) -> Result:
    started = time.perf_counter()
    check_time(config)
    run_dir.check(folder, config)
    display.phase("reading pictures and loading the base" if config.data.pictures else "loading the base")
    if config.grid.name == "ray":
        from simulations.grid import ray

        ray.require()
    from models.base import assets
    from privacy.storage import FileStorage
    from server.ledger import ServerLedger
    from simulations import setup
    from simulations.fleet import participants
    from simulations.fleet.virtual_fleet import lives
    from strategies.build import build
    from strategies.planning.full_plan import training_plan

    frozen, people, database = here = setup.build(config, folder)
    chosen = participants.judged(people, config.evaluation.devices)
    plan = training_plan(config, run=run_dir.config_hash(config)[:16], base=frozen.hash)
    lived = lives(config, people, folder / "fleet") if config.fleet.timed else None
    strategy = build(
        config,
        plan,
        frozen.sites,
        accept_simulated=True,
        ledger=ServerLedger(FileStorage(folder)),
        clock=lived.clock if lived else None,
        base=frozen,
    )
    from training.memory import budget, check_free

    memory = budget(config.cohort.memory_gib, frozen.device)
    check_free(memory, frozen.device)
    hashes = {"base": frozen.hash, "data": assets.digest(assets.locate("typefaces"))}
    if own := participants.identity(people):
        hashes[run_dir.PICTURES] = own
    memory = run_dir.claim(folder, config, hashes, memory=memory)  # whatever can be refused, was
    from simulations.report import results

    perform = setup.performer(config, frozen, memory)
    with grid(config, folder, here, perform, memory, lived) as devices:
        state = federate(config, folder, strategy, plan, devices, people, chosen, display, lived)
    facts = lived.log.rounds if lived else ()
    summary = results.finish(
        config, folder, frozen, people, chosen, perform, memory, state, display, started, command, facts
    )
    database.close()
    return Result(folder, summary)


def check_time(config: SimulationConfig) -> None:
    """Refuse what needs devices that take time, of a fleet that answers at once, and what is more than all of it."""
    fleet, chosen = config.fleet, config.strategy
    mend = "choose a fleet with timed=true, such as fleet=week"
    if fleet.overselect > 1 and not fleet.timed:
        raise AntherError(f"fleet.overselect={fleet.overselect:g}: all replies of this fleet come at once; {mend}")
    if chosen.timing == "async" and not fleet.timed:
        raise AntherError(f"strategy.timing=async: training takes this fleet no time; {mend}")
    for key in () if fleet.timed else _lived_by(config):
        raise AntherError(f"{key}: devices of this fleet have no battery, owner, heat or hours; {mend}")
    if chosen.timing == "sync" and chosen.quorum > (devices := config.data.count()):
        raise AntherError(f"strategy.quorum={chosen.quorum}: there are {devices} devices; lower it, or add some")


def _lived_by(config: SimulationConfig) -> Iterator[str]:
    """Settings that are given, and that only a fleet with a life of its own goes by."""
    eligible, fleet = config.fleet.eligible, config.fleet
    if eligible.battery is not None:
        yield f"fleet.eligible.battery={eligible.battery:g}"
    if eligible.idle:
        yield "fleet.eligible.idle=true"
    if eligible.cool:
        yield "fleet.eligible.cool=true"
    if config.strategy.battery_share is not None:
        yield f"strategy.battery_share={config.strategy.battery_share:g}"
    if fleet.zones:
        yield f"fleet.zones={fleet.zones:g}"
    if fleet.jitter != type(fleet).jitter:
        yield f"fleet.jitter={fleet.jitter:g}"


def grid(
    config: SimulationConfig,
    folder: Path,
    here: SimulationSetup,
    perform: Perform,
    memory: int,
    lived: VirtualFleet | None,
) -> AbstractContextManager[Grid]:
    """What drives the devices, while the context lasts."""
    if config.grid.name == "ray":
        from simulations.grid.ray import ray_grid

        return ray_grid(config, folder, devices=len(here.people), device=here.base.device.type, memory=memory)
    from simulations.grid.cohort import CohortGrid

    devices, together = [person.device for person in here.people], config.grid.name == "cohort"
    if lived:
        from simulations.fleet.costs import costs
        from simulations.grid.timed import TimedGrid

        taken, storage = costs(config, here.base), here.database.together
        return nullcontext(
            TimedGrid(devices, perform, lives=lived, costs=taken, seed=config.seed, together=together, storage=storage)
        )
    return nullcontext(CohortGrid(devices, perform, together=together, storage=here.database.together))


def federate(
    config: SimulationConfig,
    folder: Path,
    strategy: Federated,
    plan: TrainingPlan,
    grid: Grid,
    people: list[Participant],
    judged: list[Participant],
    display: Display,
    lived: VirtualFleet | None,
) -> RunState:
    """All rounds, and a personal adapter on each device that is judged, on top of the best shared one."""
    from server.report.trackers import open_trackers
    from server.rounds import checkpoint
    from server.rounds.federation import federate

    saved = checkpoint.load(folder / "checkpoints", sites=strategy.sites)
    if lived and saved:
        lived.resume(saved.round)
    with open_trackers(folder, tensorboard=config.tracker.tensorboard) as tracker:

        def on_round(record: Round) -> None:
            values = _numbers(record, lived.log.rounds[record.number] if lived else None)
            tracker.log(record.number, values)
            if record.number:
                display.round({**values, "guarantees": record.guarantees})
            if record.number == config.rounds:
                display.phase("personalising")

        for record in saved.history if saved else ():  # told again: a kill may have come before its line was written
            on_round(record)
        display.phase("training" if saved is None or saved.round < config.rounds else "personalising")
        return federate(
            config,
            grid=grid,
            strategy=strategy,
            plan=plan,
            saved=saved,
            checkpoints=folder / "checkpoints",
            on_round=on_round,
            present=0 if lived else len(people),
            clock=lived.clock if lived else None,
            keep=lived.keep if lived else lambda _: None,
            personalized_devices={person.name for person in judged},
        )


def _numbers(record: Round, fleet: FleetRound | None) -> dict[str, Any]:
    """One round as flat numbers, for trackers and the display.

    Args:
        fleet: what really became of a fleet that lives on a clock of its own.
    """
    from server.report.trackers import round_metrics

    values, train = round_metrics(record), record.train
    if fleet:
        values |= {
            "hours": fleet.ended / 3600,
            "fleet_joules": fleet.joules,
            "battery_joules": fleet.drained,
            "lost": sum(fleet.lost.values()),
        }
        values |= {f"lost/{reason}": count for reason, count in fleet.lost.items()}
        values["late"] = train.dropped.get("late", 0) if train else 0
    return values


def resume_command(overrides: Sequence[str], folder: Path) -> str:
    """The command that continues a run, quoted for Hydra and for the shell.

    Args:
        overrides: what it was started with.
        folder: of the run.
    """
    kept = [word for word in overrides if not word.startswith(("resume=", "hydra.run.dir="))]
    return shlex.join([*_program(), *kept, f"hydra.run.dir={quote(str(folder))}", "resume=true"])


def _program() -> list[str]:
    return program("simulations.run")


if __name__ == "__main__":
    main()
