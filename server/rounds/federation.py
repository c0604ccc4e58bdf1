"""A whole federation over some grid: all rounds, then personal adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.serverapp import Grid

from common.seeding import derive_seed
from conf.schemas.simulation import Simulation
from models.lora.adapter import initial, to_tensors
from models.lora.lora_xs import empty
from protocol.messages import Personalise, TrainingPlan
from protocol.tensor_codec import encode
from server.rounds.fedbuff import Buffered
from server.rounds.loop import personalise, run_rounds
from server.rounds.state import Round, State
from server.rounds.sync import Leg, Pace, Synchronous
from strategies.clock import Clock
from strategies.fedbuff import CONCURRENCY, SHIFTS, SIZE
from strategies.strategy import Federated


def federate(
    config: Simulation,
    *,
    grid: Grid,
    strategy: Federated,
    plan: TrainingPlan,
    saved: State | None,
    checkpoints: Path,
    on_round: Callable[[Round], None],
    present: int = 1,
    waits: bool = False,
    patience: float = math.inf,
    clock: Clock | None = None,
    keep: Callable[[int], None] = lambda _: None,
    personal_on: Collection[str] | None = None,
) -> State:
    """Begin a run, or continue it from `saved`; personal adapters sit on the best shared one.

    Args:
        present, waits, patience, keep: as for `run_rounds`.
        clock: as of its pace.
        personal_on: names of the devices that are asked for a personal adapter; None: every device.
    """
    state = saved or State.start(
        run=plan.run,
        private=strategy.private,
        adapter=empty(strategy.frame)
        if strategy.frame
        else initial(strategy.sites, config.adapter.shared.rank, derive_seed(config.seed, "shared")),
    )
    chosen, fleet = config.strategy, config.fleet
    enough = fleet.sample if fleet.overselect > 1 else None
    pace = Pace(clock=clock, timeout=chosen.timeout, enough=enough, seed=config.seed)
    state = run_rounds(
        grid=grid,
        strategy=strategy,
        state=state,
        rounds=config.rounds,
        checkpoints=checkpoints,
        on_round=on_round,
        pace=pace,
        leg=leg(config, grid, strategy, pace),
        present=present,
        waits=waits,
        patience=patience,
        keep=keep,
    )
    personal = config.adapter.personal
    request = Personalise(
        run=plan.run,
        round=config.rounds,
        adapter=encode(to_tensors(state.best_adapter)),
        rank=personal.rank,
        steps=personal.steps,
        batch_size=personal.batch_size,
        learning_rate=personal.learning_rate,
        look_every=config.adapter.look_every,
        patience=config.adapter.patience,
    )
    personalise(grid=grid, strategy=strategy, request=request, devices=personal_on, timeout=chosen.timeout)
    return state


def leg(config: Simulation, grid: Grid, strategy: Federated, pace: Pace) -> Leg:
    """How the rounds of this configuration train."""
    chosen = config.strategy
    if chosen.timing == "sync":
        return Synchronous(grid, strategy, pace)
    size, concurrency = chosen.buffer or SIZE, config.fleet.concurrency or CONCURRENCY
    return Buffered(grid, strategy, pace, shift=SHIFTS[chosen.aggregation], size=size, concurrency=concurrency)
