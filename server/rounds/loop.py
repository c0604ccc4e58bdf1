"""The round loop: select, train, aggregate, evaluate, checkpoint.

Flower's own `Strategy.start` always begins at round 1 and keeps its result in memory; this loop continues from any
`RunState`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid

from protocol.messages import Personalize
from server.rounds import checkpoint
from server.rounds.patience import RoundRetries, wait_for_devices
from server.rounds.state import Round, RunState
from server.rounds.sync import RoundLimits, RoundRunner, SyncRunner
from strategies.central_dp import BudgetExhausted
from strategies.clock import WallClock
from strategies.round.history import TrainingHistory
from strategies.round.messages import to_messages
from strategies.round.metrics import PersonalizationMetrics, ValidationMetrics
from strategies.round.request import RoundResult, RoundStart
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
    ledger = strategy.central_dp.ledger if strategy.central_dp else None
    if ledger:
        ledger.check(state.ledger)
        ledger.release(state.run, state.round)  # a kill may have prevented this call after the last checkpoint
    round_runner = round_runner or SyncRunner(grid, strategy, limits)
    first, clock = state.round, limits.clock or WallClock()
    retries, start = RoundRetries(clock, patience), _first_start(state)
    while state.round < rounds:
        number, started = state.round + 1, time.perf_counter()
        needed = min_devices if state.round == first else min(min_devices, 1)
        wait_for_devices(grid, strategy, needed, clock, limits.timeout, wait_forever=wait_forever)
        quorum = strategy.update.quorum if wait_forever and strategy.can_redraw else 0
        start = replace(start, number=number, adapter=strategy.format.as_decoded(state.adapter))
        train = None
        if number > 0:
            try:
                result = round_runner.train(start)
            except BudgetExhausted as error:
                log.warning("the run ends after round %d of %d: %s", state.round, rounds, error)
                break
            start, train = _after_training(start, result), result.metrics
            if train.replied < quorum:
                retries.wait(number, train, quorum=quorum)
                continue
        retries.reset()
        validation = _evaluate(grid, strategy, start, limits.timeout)
        start = replace(start, history=start.history.after_evaluation(validation))
        done = Round(number=number, train=train, validation=validation, wall_seconds=time.perf_counter() - started)
        state = state.after(done, start.adapter, ledger.anchor() if ledger else None, start.memory)
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
    sent = strategy.personalization.request(request, grid, devices)
    return strategy.personalization.finish(sent, grid.send_and_receive(to_messages(sent.messages), timeout=timeout))


def _first_start(state: RunState) -> RoundStart:
    """Return the state before the next round of a run."""
    rounds = [done.train for done in state.history]
    return RoundStart(
        number=state.round + 1,
        adapter=state.adapter,
        memory=state.memory,
        history=TrainingHistory.of(state.devices, rounds),
        release=rounds[-1].central if rounds and rounds[-1] else None,
    )


def _after_training(start: RoundStart, result: RoundResult) -> RoundStart:
    """Return the state after a training: before its evaluation, or before another attempt if this one doesn't count."""
    return replace(
        start,
        adapter=start.adapter if result.adapter is None else result.adapter,
        memory=result.memory,
        history=start.history.after_training(result.metrics),
        release=result.metrics.central,
    )


def _evaluate(grid: Grid, strategy: FederatedStrategy, start: RoundStart, timeout: float) -> ValidationMetrics:
    """Evaluate the adapter of a round on devices, if it is due; before training, an adapter's loss is the base's."""
    request = strategy.evaluation.request(start, grid) if start.number > 0 else None
    if request is None:
        return ValidationMetrics(base=None, shared=None)
    return strategy.evaluation.finish(request, grid.send_and_receive(to_messages(request.messages), timeout=timeout))
