"""A complete federation over any grid: all rounds, then personal adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.serverapp import Grid

from common.seeding import derive_seed
from conf.schemas.federation import FederationConfig
from models.lora.adapter import Adapter, init_adapter, to_tensors
from models.lora.lora_xs import zero_adapter
from protocol.messages import Personalize, TrainingPlan
from protocol.tensor_codec import encode
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.loop import personalize, run_rounds
from server.rounds.state import Round, RunState
from server.rounds.sync import RoundLimits, RoundRunner, SyncRunner
from strategies.clock import Clock
from strategies.download import AdapterFormat
from strategies.factory.personalization import build_personalization, personalization_method
from strategies.strategy import FederatedStrategy


def federate(
    config: FederationConfig,
    *,
    grid: Grid,
    strategy: FederatedStrategy,
    plan: TrainingPlan,
    saved: RunState | None,
    checkpoints: Path,
    on_round: Callable[[Round], None],
    min_devices: int = 1,
    wait_forever: bool = False,
    patience: float = math.inf,
    clock: Clock | None = None,
    before_checkpoint: Callable[[int], None] = lambda _: None,
    personalized_devices: Collection[str] | None = None,
) -> RunState:
    """Start a run, or continue it from `saved`; then train personal adapters on top of the best shared one.

    Args:
        config: configuration of the run.
        grid: connection to the devices.
        strategy: strategy of the run.
        plan: training plan of the run.
        saved: state to continue from; None: a new run.
        checkpoints: folder of the checkpoints.
        on_round: called after each round's checkpoint.
        min_devices, wait_forever, patience, before_checkpoint: as in `run_rounds`.
        clock: clock of `RoundLimits`.
        personalized_devices: names of the devices that train a personal adapter; None: all.

    Returns:
        The state after the last round.
    """
    last = strategy.update.personalization.last_round_steps is not None  # earlier adapters have no directions
    state = saved or RunState.start(
        run=plan.run, private=strategy.private or last, adapter=_initial_adapter(config, strategy.format)
    )
    timeout, cohort = config.round_loop.timeout, config.cohort
    target = cohort.size if cohort.overselection > 1 else None
    limits = RoundLimits(clock=clock, timeout=timeout, target_replies=target, seed=config.seed)
    state = run_rounds(
        grid=grid,
        strategy=strategy,
        state=state,
        rounds=config.rounds,
        checkpoints=checkpoints,
        on_round=on_round,
        limits=limits,
        round_runner=round_runner(config, grid, strategy, limits),
        min_devices=min_devices,
        wait_forever=wait_forever,
        patience=patience,
        before_checkpoint=before_checkpoint,
    )
    personalize_devices(config, grid=grid, strategy=strategy, plan=plan, state=state, devices=personalized_devices)
    return state


def _initial_adapter(config: FederationConfig, format: AdapterFormat) -> Adapter:
    """Return the adapter of the first round."""
    if format.lora_xs_bases:
        return zero_adapter(format.lora_xs_bases)
    shared = init_adapter(format.sites, config.adapter.shared.rank, derive_seed(config.seed, "shared"))
    return build_personalization(config).initial(shared, derive_seed(config.seed, "directions"))


def personalize_devices(
    config: FederationConfig,
    *,
    grid: Grid,
    strategy: FederatedStrategy,
    plan: TrainingPlan,
    state: RunState,
    devices: Collection[str] | None = None,
) -> None:
    """Train personal adapters on top of the best shared one.

    Args:
        config: configuration of the run.
        grid: connection to the devices.
        strategy: strategy of the run.
        plan: training plan of the run.
        state: state after the last round.
        devices: names of the devices; None: all.
    """
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
        method=personalization_method(config),
    )
    timeout = config.round_loop.timeout
    personalize(grid=grid, strategy=strategy, request=request, devices=devices, timeout=timeout)


def round_runner(config: FederationConfig, grid: Grid, strategy: FederatedStrategy, limits: RoundLimits) -> RoundRunner:
    """Build the round runner of a configuration.

    Args:
        config: configuration of the run; `round_loop` selects the runner.
        grid: connection to the devices.
        strategy: strategy of the run.
        limits: limits on the wait for replies.
    """
    loop = config.round_loop
    if loop.buffer_size is None or loop.concurrency is None:  # round_loop=sync
        return SyncRunner(grid, strategy, limits)
    return FedBuffRunner(grid, strategy, limits, size=loop.buffer_size, concurrency=loop.concurrency)
