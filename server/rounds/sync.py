"""How a round trains: all that were asked, or as many as are enough, in the time that there is."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from common.seeding import derive_seed
from server.rounds.collect import StragglerTracker, collect
from strategies.clock import Clock, WallClock
from strategies.strategy import Federated


@dataclass(frozen=True, kw_only=True)
class RoundLimits:
    """How long rounds wait, and for whom."""

    clock: Clock | None = None
    """Whose time goes by; None: a round's replies are waited for as long as the grid sees fit."""
    timeout: float = 3600.0
    """Seconds that are waited for devices which can be asked, and for their replies."""
    enough: int | None = None
    """Good replies that end a round; None: all."""
    seed: int = 0
    """Of who goes first where several of these replies come at once."""


class RoundRunner(Protocol):
    """Trains for one round; what came of it is in `Federated.trained`."""

    def train(self, number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """The adapter after the round; None to keep the one before."""
        ...


class SyncRunner:
    """A round ends before the next begins.

    A reply that comes after its round is dropped, and counted as `late` in the round in which it came.
    """

    def __init__(self, grid: Grid, strategy: Federated, pace: RoundLimits) -> None:
        self._grid, self._strategy, self._pace = grid, strategy, pace
        self._late = StragglerTracker(grid)

    def train(self, number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        pace, strategy = self._pace, self._strategy
        messages = ask(strategy, self._grid, number, arrays, pace)
        if pace.clock is None and pace.enough is None:
            found, _ = strategy.aggregate_train(number, self._grid.send_and_receive(messages, timeout=pace.timeout))
            return found
        clock, left = pace.clock or WallClock(), set[str]()
        if pace.enough is not None:  # of replies that come at once names must not decide whose count
            random.Random(derive_seed(pace.seed, number, "replies")).shuffle(messages)
        replies = collect(
            self._grid,
            messages,
            clock,
            until=clock.now() + pace.timeout,
            enough=lambda: pace.enough is not None and strategy.accepted >= pace.enough,
            late=left,
        )
        found, _ = strategy.aggregate_train(number, replies)
        if (late := self._late.came(round=number)) and strategy.trained:
            dropped = {**strategy.trained.dropped, "late": late}
            strategy.trained = replace(strategy.trained, dropped=dropped)
        self._late.add(left, round=number)
        return found


def ask(strategy: Federated, grid: Grid, number: int, arrays: ArrayRecord, pace: RoundLimits) -> list[Message]:
    """Messages for whoever is to train; where nobody can be asked yet, after a while, and none if it takes too long."""
    config = ConfigRecord()  # Flower's own place for settings: ours travel in the messages
    messages = list(strategy.configure_train(number, arrays, config, grid))
    if (clock := pace.clock) is None:
        return messages
    until = clock.now() + pace.timeout
    while not messages and strategy.can_redraw and clock.now() < until:
        clock.wait(until)
        messages = list(strategy.configure_train(number, arrays, config, grid))
    return messages
