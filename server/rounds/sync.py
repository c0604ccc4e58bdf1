"""Round runners: send requests, collect replies until a limit is reached, aggregate them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from common.seeding import derive_seed
from server.rounds.collect import StragglerTracker, collect
from strategies.clock import Clock, WallClock
from strategies.round.messages import to_messages
from strategies.round.request import RoundRequest, RoundResult, RoundStart
from strategies.round.updates import RoundUpdates
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
    """Train for one round."""

    def train(self, start: RoundStart) -> RoundResult:
        """Return the result of a round."""
        ...


class SyncRunner:
    """Run rounds one after another.

    A reply that arrives after its round is discarded, and counted as `late` in the round in which it arrived.
    """

    def __init__(self, grid: Grid, strategy: FederatedStrategy, limits: RoundLimits) -> None:
        self._grid, self._strategy, self._limits = grid, strategy, limits
        self._stragglers = StragglerTracker(grid)

    def train(self, start: RoundStart) -> RoundResult:
        training, missing = self._strategy.training, set[str]()
        request = request_training(self._strategy, self._grid, start, self._limits)
        with training.open_updates(start, request) as updates:
            dropped = training.accept(start, request, self._replies(start, request, updates, missing), updates)
            if late := self._stragglers.count(round=start.number):
                dropped = {**dropped, "late": late}
            self._stragglers.add(missing, round=start.number)
            return training.finish(start, [request], updates, dropped)

    def _replies(
        self, start: RoundStart, request: RoundRequest, updates: RoundUpdates, missing: set[str]
    ) -> Iterable[Message]:
        """Send the requests of a round, and yield the replies that arrive in time.

        Args:
            start: state before the round.
            request: the requests.
            updates: accepted updates of the round.
            missing: receives the ids of messages without a reply.
        """
        limits, target, messages = self._limits, self._limits.target_replies, to_messages(request.messages)
        if limits.clock is None and target is None:
            return self._grid.send_and_receive(messages, timeout=limits.timeout)
        clock = limits.clock or WallClock()
        if target is not None:  # among simultaneous replies, names must not decide which ones count
            random.Random(derive_seed(limits.seed, start.number, "replies")).shuffle(messages)
        return collect(
            self._grid,
            messages,
            clock,
            until=clock.now() + limits.timeout,
            is_complete=lambda: target is not None and len(updates) >= target,
            late=missing,
        )


def request_training(strategy: FederatedStrategy, grid: Grid, start: RoundStart, limits: RoundLimits) -> RoundRequest:
    """Select devices and return their requests.

    Args:
        strategy: selects the devices.
        grid: connection to the devices.
        start: state before the round.
        limits: if no device can be asked yet, wait for up to `limits.timeout` seconds.

    Returns:
        One request per device; none if no device could be asked in time.
    """
    request = strategy.training.request(start, grid)
    if (clock := limits.clock) is None:
        return request
    until = clock.now() + limits.timeout
    while not request.messages and strategy.can_redraw and clock.now() < until:
        clock.wait(until)
        request = strategy.training.request(start, grid)
    return request
