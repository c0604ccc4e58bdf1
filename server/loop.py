"""The round loop: ask, train, aggregate, evaluate, checkpoint.

Flower's own `Strategy.start` begins at round 1 every time and keeps its result in memory; this one continues from
wherever a State stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from conf.errors import AntherError
from models.adapter import from_tensors, shapes, to_tensors
from protocol.codec import decode, encode
from protocol.messages import Personalise
from protocol.records import adapter_from_record, adapter_to_record
from server import checkpoint
from server.state import Round, State
from strategies.facts import PersonalFacts, Validation
from strategies.federated import Federated
from strategies.private import Exhausted

log = logging.getLogger(__name__)

_POLL = 3.0  # seconds between two looks for devices


def run_rounds(
    *,
    grid: Grid,
    strategy: Federated,
    state: State,
    rounds: int,
    checkpoints: Path,
    on_round: Callable[[Round], None],
    timeout: float = 3600.0,
    quorum: int = 1,
) -> State:
    """Continue a run until `rounds` rounds of training are complete.

    Args:
        state: fresh, or as `checkpoint.load` gave it. Round 0 is only what training starts from.
        on_round: called after each round's checkpoint. A kill between the two loses the call, so whoever resumes
            should first replay `state.history`.
        timeout: seconds to wait for the replies of one leg, and for devices to appear.
        quorum: devices that must be there to begin a round.

    With privacy per device, a round that its budget doesn't pay for is not begun: the run ends with those that it has.

    Raises AntherError if fewer devices than `quorum` are there after `timeout`, or if the server's ledger is not the
    one of this state.
    """
    strategy.summary()
    strategy.remember(state.devices)
    strategy.memory = state.memory
    ledger = strategy.device_level.ledger if strategy.device_level else None
    if ledger:
        ledger.check(state.ledger)
        ledger.release(state.run, state.round)  # a kill may have come between a checkpoint and this line
    for number in range(state.round + 1, rounds + 1):
        _wait_for_devices(grid, strategy, quorum, timeout)
        try:
            state = _one_round(number, grid, strategy, state, timeout)
        except Exhausted as over:
            log.warning("the run ends after round %d of %d: %s", state.round, rounds, over)
            break
        checkpoint.save(checkpoints, state)
        if ledger:
            ledger.release(state.run, number)
        on_round(state.history[-1])
    return state


def personalise(
    *,
    grid: Grid,
    strategy: Federated,
    request: Personalise,
    devices: Collection[str] | None = None,
    timeout: float = 3600.0,
) -> PersonalFacts:
    """Ask devices, by name or all of them, to train their personal adapters on top of the one in `request`."""
    return strategy.aggregate_personalise(
        grid.send_and_receive(strategy.configure_personalise(request, grid, devices), timeout=timeout)
    )


def _one_round(number: int, grid: Grid, strategy: Federated, state: State, timeout: float) -> State:
    started = time.perf_counter()
    arrays = adapter_to_record(encode(to_tensors(state.adapter)))
    config = ConfigRecord()  # Flower's own place for settings: ours travel in the messages
    train = None
    if strategy.device_level:
        last = state.history[-1].train if state.history else None
        strategy.device_level.resume(last.central if last else None)
    if number > 0:
        replies = grid.send_and_receive(strategy.configure_train(number, arrays, config, grid), timeout=timeout)
        aggregated, _ = strategy.aggregate_train(number, replies)
        arrays = arrays if aggregated is None else aggregated
        train = strategy.trained
    validation = Validation(base=None, shared=None)
    if number > 0 and strategy.measures(number):  # before training an adapter adds nothing: it measures as the base
        replies = grid.send_and_receive(strategy.configure_evaluate(number, arrays, config, grid), timeout=timeout)
        strategy.aggregate_evaluate(number, replies)
        validation = strategy.validation or validation
    adapter = from_tensors(decode(adapter_from_record(arrays), shapes(strategy.sites, -1)))
    done = Round(number=number, train=train, validation=validation, wall_seconds=time.perf_counter() - started)
    anchor = strategy.device_level.ledger.anchor() if strategy.device_level else None
    return state.after(done, adapter, anchor, strategy.memory)


def _wait_for_devices(grid: Grid, strategy: Federated, quorum: int, timeout: float) -> None:
    """Return once `quorum` devices with our base are there."""
    until = time.monotonic() + timeout
    while len(found := strategy.query(grid)) < quorum:
        if time.monotonic() >= until:
            raise AntherError(
                f"{len(found)} of {quorum} devices are there after {timeout:g} s: "
                "check that they are connected and hold the base of this run"
            )
        time.sleep(min(_POLL, max(until - time.monotonic(), 0.0)))
