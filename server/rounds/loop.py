"""The round loop: select, train, aggregate, evaluate, checkpoint.

Flower's own `Strategy.start` always begins at round 1 and keeps its result in memory; this loop continues from any
`RunState`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from models.lora.adapter import adapter_shapes, from_tensors, to_tensors
from protocol.messages import Personalize
from protocol.records import adapter_from_record, adapter_to_record
from protocol.tensor_codec import decode, encode
from server.rounds import checkpoint
from server.rounds.patience import RoundRetries, wait_for_devices
from server.rounds.state import Round, RunState
from server.rounds.sync import RoundLimits, RoundRunner, SyncRunner
from strategies.central_dp import BudgetExhausted
from strategies.clock import WallClock
from strategies.round.metrics import PersonalizationMetrics, ValidationMetrics
from strategies.strategy import FederatedStrategy

log = logging.getLogger(__name__)


def run_rounds(
    *,
    grid: Grid,
    strategy: FederatedStrategy,
    state: RunState,
    rounds: int,
    checkpoints: Path,
    on_round: Callable[[Round], None],
    limits: RoundLimits = RoundLimits(),  # noqa: B008  # the default is immutable
    round_runner: RoundRunner | None = None,
    min_devices: int = 1,
    wait_forever: bool = False,
    patience: float = math.inf,
    before_checkpoint: Callable[[int], None] = lambda _: None,
) -> RunState:
    """Continue a run until `rounds` rounds of training are complete.

    Under device-level privacy, the run ends early before a round that would exceed the budget.

    Args:
        grid: connection to the devices.
        strategy: selection, aggregation and privacy of the run.
        state: initial state, or the one that `checkpoint.load` returned. Round 0 is the state before training.
        rounds: total number of rounds.
        checkpoints: folder of the checkpoints.
        on_round: called after each round's checkpoint. A kill between the two loses the call, so the caller should
            replay `state.history` when it resumes.
        limits: limits on the wait for replies.
        round_runner: runs the training of a round (default: rounds run one after another).
        min_devices: number of devices that must be connected before the first of these rounds. Later rounds need one,
            or none if `min_devices` is 0.
        wait_forever: wait for devices without limit, as in a real federation, where devices are offline for hours. A
            round with too few accepted replies then doesn't count and is retried after a while, unless its sample was
            charged.
        patience: hours without a successful round after which such a run stops unfinished.
        before_checkpoint: called before each round's checkpoint, to store data that belongs to it.

    Returns:
        The state after the last completed round.

    Raises:
        AntherError: too few devices are connected after `limits.timeout` seconds (without `wait_forever`), there was
            no successful round for `patience` hours, or the server's ledger is not the one of this state.
    """
    strategy.summary()
    strategy.restore_history(state.devices, (done.train for done in state.history))
    strategy.state = state.memory
    ledger = strategy.central_dp.ledger if strategy.central_dp else None
    if ledger:
        ledger.check(state.ledger)
        ledger.release(state.run, state.round)  # a kill may have prevented this call after the last checkpoint
    round_runner = round_runner or SyncRunner(grid, strategy, limits)
    first, clock = state.round, limits.clock or WallClock()
    retries = RoundRetries(clock, patience)
    while state.round < rounds:
        number = state.round + 1
        needed = min_devices if state.round == first else min(min_devices, 1)
        wait_for_devices(grid, strategy, needed, clock, limits.timeout, wait_forever=wait_forever)
        quorum = strategy.quorum if wait_forever and strategy.can_redraw else 0
        try:
            after = _one_round(number, grid, strategy, state, round_runner, limits.timeout, quorum=quorum)
        except BudgetExhausted as error:
            log.warning("the run ends after round %d of %d: %s", state.round, rounds, error)
            break
        if after is None:
            retries.wait(number, strategy.trained, quorum=quorum)
            continue
        retries.reset()
        state = after
        before_checkpoint(number)
        checkpoint.save(checkpoints, state)
        if ledger:
            ledger.release(state.run, number)
        on_round(state.history[-1])
    return state


def personalize(
    *,
    grid: Grid,
    strategy: FederatedStrategy,
    request: Personalize,
    devices: Collection[str] | None = None,
    timeout: float,
) -> PersonalizationMetrics:
    """Ask devices, by name or all of them, to train their personal adapters on top of the adapter in `request`.

    Args:
        grid: connection to the devices.
        strategy: strategy of the run.
        request: request for all of these devices.
        devices: names of the devices; None: all.
        timeout: seconds to wait for their replies.
    """
    return strategy.aggregate_personalize(
        grid.send_and_receive(strategy.configure_personalize(request, grid, devices), timeout=timeout)
    )


def _one_round(
    number: int,
    grid: Grid,
    strategy: FederatedStrategy,
    state: RunState,
    round_runner: RoundRunner,
    timeout: float,
    *,
    quorum: int,
) -> RunState | None:
    """Run one round, and return the state after it; None if it has fewer accepted replies than it needs."""
    started = time.perf_counter()
    arrays = adapter_to_record(encode(to_tensors(state.adapter)))
    config = ConfigRecord()  # Flower's record for settings; Anther sends its settings in the messages
    train = None
    if strategy.central_dp:
        last = state.history[-1].train if state.history else None
        strategy.central_dp.resume(last.central if last else None)
    if number > 0:
        aggregated = round_runner.train(number, arrays)
        arrays = arrays if aggregated is None else aggregated
        train = strategy.trained
        if train is None or train.replied < quorum:
            return None
    validation = ValidationMetrics(base=None, shared=None)
    if number > 0 and strategy.is_evaluated(number):  # before training, an adapter's loss is the base's
        replies = grid.send_and_receive(strategy.configure_evaluate(number, arrays, config, grid), timeout=timeout)
        strategy.aggregate_evaluate(number, replies)
        validation = strategy.validation or validation
    adapter = from_tensors(decode(adapter_from_record(arrays), adapter_shapes(strategy.sites, -1)))
    done = Round(number=number, train=train, validation=validation, wall_seconds=time.perf_counter() - started)
    anchor = strategy.central_dp.ledger.anchor() if strategy.central_dp else None
    return state.after(done, adapter, anchor, strategy.state)
