"""A whole federation over some grid: all rounds, then personal adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.serverapp import Grid

from common.seeding import derive_seed
from conf.schemas.simulation import SimulationConfig
from models.lora.adapter import init_adapter, to_tensors
from models.lora.lora_xs import zero_adapter
from protocol.messages import Personalize, TrainingPlan
from protocol.tensor_codec import encode
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.loop import personalize, run_rounds
from server.rounds.state import Round, RunState
from server.rounds.sync import RoundLimits, RoundRunner, SyncRunner
from strategies.clock import Clock
from strategies.fedbuff import BUFFER_SIZE, CONCURRENCY, REBASES
from strategies.strategy import Federated


def federate(
    config: SimulationConfig,
    *,
    grid: Grid,
    strategy: Federated,
    plan: TrainingPlan,
    saved: RunState | None,
    checkpoints: Path,
    on_round: Callable[[Round], None],
    present: int = 1,
    wait_forever: bool = False,
    patience: float = math.inf,
    clock: Clock | None = None,
    keep: Callable[[int], None] = lambda _: None,
    personalized_devices: Collection[str] | None = None,
) -> RunState:
    """Begin a run, or continue it from `saved`; personal adapters sit on the best shared one.

    Args:
        present, waits, patience, keep: as for `run_rounds`.
        clock: as of its pace.
        personal_on: names of the devices that are asked for a personal adapter; None: every device.
    """
    state = saved or RunState.start(
        run=plan.run,
        private=strategy.private,
        adapter=zero_adapter(strategy.lora_xs_bases)
        if strategy.lora_xs_bases
        else init_adapter(strategy.sites, config.adapter.shared.rank, derive_seed(config.seed, "shared")),
    )
    timeout, cohort = config.round_loop.timeout, config.cohort
    enough = cohort.size if cohort.overselection > 1 else None
    pace = RoundLimits(clock=clock, timeout=timeout, enough=enough, seed=config.seed)
    state = run_rounds(
        grid=grid,
        strategy=strategy,
        state=state,
        rounds=config.rounds,
        checkpoints=checkpoints,
        on_round=on_round,
        pace=pace,
        round_runner=round_runner(config, grid, strategy, pace),
        present=present,
        wait_forever=wait_forever,
        patience=patience,
        keep=keep,
    )
    personal = config.adapter.personal
    request = Personalize(
        run=plan.run,
        round=config.rounds,
        adapter=encode(to_tensors(state.best_adapter)),
        rank=personal.rank,
        steps=personal.steps,
        batch_size=personal.batch_size,
        learning_rate=personal.lr,
        look_every=config.adapter.eval_interval,
        patience=config.adapter.patience,
    )
    personalize(grid=grid, strategy=strategy, request=request, devices=personalized_devices, timeout=timeout)
    return state


def round_runner(config: SimulationConfig, grid: Grid, strategy: Federated, pace: RoundLimits) -> RoundRunner:
    """How the rounds of this configuration train."""
    loop = config.round_loop
    if loop.mode == "sync":
        return SyncRunner(grid, strategy, pace)
    size, concurrency = loop.buffer_size or BUFFER_SIZE, loop.concurrency or CONCURRENCY
    return FedBuffRunner(
        grid, strategy, pace, shift=REBASES[config.aggregation.name], size=size, concurrency=concurrency
    )
