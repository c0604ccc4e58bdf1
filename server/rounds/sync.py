"""Round runners: send requests, collect replies until a limit is reached, aggregate them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from common.seeding import derive_seed
from server.rounds.collect import StragglerTracker, collect
from strategies.clock import Clock, WallClock
from strategies.strategy import FederatedStrategy


@dataclass(frozen=True, kw_only=True)
class RoundLimits:
    """Limits on the wait for a round's replies."""

    clock: Clock | None = None
    """Clock of the wait; None: the grid limits the wait for replies."""
    timeout: float = 3600.0
    """Seconds to wait for devices that can be asked, and for their replies."""
    target_replies: int | None = None
    """Number of accepted replies that ends a round; None: all replies."""
    seed: int = 0
    """Seed of the order among replies that arrive at the same time."""


class RoundRunner(Protocol):
    """Train for one round; metrics are in `FederatedStrategy.trained` afterwards."""

    def train(self, number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """Return the adapter after the round; None to keep the previous one."""
        ...


class SyncRunner:
    """Run rounds one after another.

    A reply that arrives after its round is discarded, and counted as `late` in the round in which it arrived.
    """

    def __init__(self, grid: Grid, strategy: FederatedStrategy, limits: RoundLimits) -> None:
        self._grid, self._strategy, self._limits = grid, strategy, limits
        self._stragglers = StragglerTracker(grid)

    def train(self, number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        limits, strategy = self._limits, self._strategy
        messages = request_training(strategy, self._grid, number, arrays, limits)
        if limits.clock is None and limits.target_replies is None:
            aggregated, _ = strategy.aggregate_train(
                number, self._grid.send_and_receive(messages, timeout=limits.timeout)
            )
            return aggregated
        clock, missing = limits.clock or WallClock(), set[str]()
        if limits.target_replies is not None:  # among simultaneous replies, names must not decide which ones count
            random.Random(derive_seed(limits.seed, number, "replies")).shuffle(messages)
        replies = collect(
            self._grid,
            messages,
            clock,
            until=clock.now() + limits.timeout,
            is_complete=lambda: limits.target_replies is not None and strategy.accepted >= limits.target_replies,
            late=missing,
        )
        aggregated, _ = strategy.aggregate_train(number, replies)
        if (late := self._stragglers.count(round=number)) and strategy.trained:
            dropped = {**strategy.trained.dropped, "late": late}
            strategy.trained = replace(strategy.trained, dropped=dropped)
        self._stragglers.add(missing, round=number)
        return aggregated


def request_training(
    strategy: FederatedStrategy, grid: Grid, number: int, arrays: ArrayRecord, limits: RoundLimits
) -> list[Message]:
    """Select devices and return their messages.

    Args:
        strategy: selects the devices.
        grid: connection to the devices.
        number: number of the round.
        arrays: the shared adapter.
        limits: if no device can be asked yet, wait for up to `limits.timeout` seconds.

    Returns:
        One message per device; none if no device could be asked in time.
    """
    config = ConfigRecord()  # Flower's record for settings; Anther sends its settings in the messages
    messages = list(strategy.configure_train(number, arrays, config, grid))
    if (clock := limits.clock) is None:
        return messages
    until = clock.now() + limits.timeout
    while not messages and strategy.can_redraw and clock.now() < until:
        clock.wait(until)
        messages = list(strategy.configure_train(number, arrays, config, grid))
    return messages
