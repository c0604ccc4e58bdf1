"""The round loop: ask, train, aggregate, evaluate, checkpoint.

Flower's own `Strategy.start` begins at round 1 every time and keeps its result in memory; this one continues from
wherever a State stands.
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
from strategies.strategy import Federated

log = logging.getLogger(__name__)


def run_rounds(
    *,
    grid: Grid,
    strategy: Federated,
    state: RunState,
    rounds: int,
    checkpoints: Path,
    on_round: Callable[[Round], None],
    pace: RoundLimits = RoundLimits(),  # noqa: B008  # it is frozen
    round_runner: RoundRunner | None = None,
    present: int = 1,
    wait_forever: bool = False,
    patience: float = math.inf,
    keep: Callable[[int], None] = lambda _: None,
) -> RunState:
    """Continue a run until `rounds` rounds of training are complete.

    Args:
        state: fresh, or as `checkpoint.load` gave it. Round 0 is only what training starts from.
        on_round: called after each round's checkpoint. A kill between the two loses the call, so whoever resumes
            should first replay `state.history`.
        pace: for how long, and for how many, a round waits.
        leg: how a round trains (default: it ends before the next begins).
        present: devices that must be there before the first of these rounds; of the others whoever is there is enough,
            if it is one, or none where `present` is 0.
        waits: for them for as long as it takes, as a real federation does whose owners sleep. A round that has too few
            good replies then doesn't count, and is tried again after a while, unless its sample was charged for.
        patience: hours without a good round after which such a run stops, unfinished.
        keep: called before each round's checkpoint: what it keeps is there for whoever resumes from that.

    With privacy per device, a round that its budget doesn't pay for is not begun: the run ends with those that it has.

    Raises AntherError if fewer devices are there after the pace's timeout than must be, unless it `wait_forever`; if its
    patience is at its end; or if the server's ledger is not the one of this state.
    """
    strategy.summary()
    strategy.remember(state.devices, (done.train for done in state.history))
    strategy.memory = state.memory
    ledger = strategy.central_dp.ledger if strategy.central_dp else None
    if ledger:
        ledger.check(state.ledger)
        ledger.release(state.run, state.round)  # a kill may have come between a checkpoint and this line
    round_runner = round_runner or SyncRunner(grid, strategy, pace)
    begun, clock = state.round, pace.clock or WallClock()
    tries = RoundRetries(clock, patience)
    while state.round < rounds:
        number = state.round + 1
        needed = present if state.round == begun else min(present, 1)
        wait_for_devices(grid, strategy, needed, clock, pace.timeout, wait_forever=wait_forever)
        needs = strategy.quorum if wait_forever and strategy.can_redraw else 0
        try:
            after = _one_round(number, grid, strategy, state, round_runner, pace.timeout, needs=needs)
        except BudgetExhausted as over:
            log.warning("the run ends after round %d of %d: %s", state.round, rounds, over)
            break
        if after is None:
            tries.again(number, strategy.trained, needed=needs)
            continue
        tries.done()
        state = after
        keep(number)
        checkpoint.save(checkpoints, state)
        if ledger:
            ledger.release(state.run, number)
        on_round(state.history[-1])
    return state


def personalize(
    *,
    grid: Grid,
    strategy: Federated,
    request: Personalize,
    devices: Collection[str] | None = None,
    timeout: float,
) -> PersonalizationMetrics:
    """Ask devices, by name or all of them, to train their personal adapters on top of the one in `request`.

    Args:
        timeout: seconds that their replies are waited for.
    """
    return strategy.aggregate_personalise(
        grid.send_and_receive(strategy.configure_personalise(request, grid, devices), timeout=timeout)
    )


def _one_round(
    number: int,
    grid: Grid,
    strategy: Federated,
    state: RunState,
    round_runner: RoundRunner,
    timeout: float,
    *,
    needs: int,
) -> RunState | None:
    """The state after one more round; None, with the state as it was, if it had fewer good replies than it needs."""
    started = time.perf_counter()
    arrays = adapter_to_record(encode(to_tensors(state.adapter)))
    config = ConfigRecord()  # Flower's own place for settings: ours travel in the messages
    train = None
    if strategy.central_dp:
        last = state.history[-1].train if state.history else None
        strategy.central_dp.resume(last.central if last else None)
    if number > 0:
        aggregated = round_runner.train(number, arrays)
        arrays = arrays if aggregated is None else aggregated
        train = strategy.trained
        if train is None or train.replied < needs:
            return None
    validation = ValidationMetrics(base=None, shared=None)
    if number > 0 and strategy.is_evaluated(number):  # before training an adapter adds nothing: it measures as the base
        replies = grid.send_and_receive(strategy.configure_evaluate(number, arrays, config, grid), timeout=timeout)
        strategy.aggregate_evaluate(number, replies)
        validation = strategy.validation or validation
    adapter = from_tensors(decode(adapter_from_record(arrays), adapter_shapes(strategy.sites, -1)))
    done = Round(number=number, train=train, validation=validation, wall_seconds=time.perf_counter() - started)
    anchor = strategy.central_dp.ledger.anchor() if strategy.central_dp else None
    return state.after(done, adapter, anchor, strategy.memory)
