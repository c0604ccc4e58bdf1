"""Asynchronous rounds with buffered aggregation.

References:
    FedBuff: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import Message
from flwr.serverapp import Grid

from models.lora.adapter import Adapter
from server.rounds.collect import FINAL_POLL, StragglerTracker, pull, push
from server.rounds.sync import RoundLimits
from strategies.clock import WallClock
from strategies.fedbuff import PLANS_PER_ROUND, Rebase, plan_number, staleness_weight
from strategies.registry import ASYNC, TIMINGS
from strategies.round.messages import to_messages
from strategies.round.request import RoundRequest, RoundResult, RoundStart
from strategies.strategy import FederatedStrategy
from strategies.validation import check
from strategies.validation.combination import named


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """Request to a device that is training."""

    node: int
    request: RoundRequest
    round: int
    """Round in which it was requested."""
    until: float
    """Time on the clock at which the server stops waiting for its reply."""


class FedBuffRunner:
    """Keep a constant number of devices training, across rounds, and end a round after K updates (FedBuff).

    Requests in flight when a run is killed are sent again after the restart.

    A round uses one update per device. Otherwise the fastest device could fill it, and no robust rule holds if one
    attacker contributes most of the updates. If only n < K devices can be asked, each contributes up to ⌈K / n⌉
    updates, its share if all were equally fast, so that a round ends with any number of devices.

    Devices with a privacy guarantee are asked at most once per round, and always under the round's own plan number.
    Their budget covers one plan per round, and a device that is asked again after a kill answers for the same plan.

    Args:
        size: K, number of updates per round.
        concurrency: number of devices that train at any time.

    Raises:
        CombinationError: the strategy requires rounds that don't overlap.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: FederatedStrategy,
        limits: RoundLimits,
        *,
        size: int,
        concurrency: int,
    ) -> None:
        self._grid, self._strategy, self._limits = grid, strategy, limits
        self._clock = limits.clock or WallClock()
        chosen = replace(strategy.combination, timing=named(TIMINGS, ASYNC), buffer_size=size)
        check(chosen)
        self._rebase: Rebase = chosen.aggregation.declared.rebase
        self._size, self._concurrency = size, concurrency
        self._in_flight: dict[str, _InFlight] = {}  # by message id
        self._done: set[int] = set()  # nodes that are not asked again in this round
        self._counts: Counter[int] = Counter()  # number of updates of each node in this round
        self._next_plan = 0  # index of the next plan in this round
        self._eligible: frozenset[int] = frozenset()  # nodes that could have been asked last
        self._until = 0.0  # end of this round, on the clock
        self._stragglers = StragglerTracker(grid)

    def train(self, start: RoundStart) -> RoundResult:
        """Aggregate the next K updates, or fewer if no more arrive in time."""
        number, training = start.number, self._strategy.training
        self._until = until = self._clock.now() + self._limits.timeout
        self._done, self._counts, self._next_plan = set(), Counter(), 0
        ended: list[_InFlight] = []
        dropped: Counter[str] = Counter()
        with training.open_updates(start) as updates:
            self._send_requests(start)
            while True:
                for flight, replies in self._arrived(until, number):
                    ended.append(flight)
                    rebase = partial(self._rebased, start, flight)
                    rejected = training.accept(start, flight.request, replies, updates, rebase=rebase)
                    dropped.update(rejected)
                    if rejected:
                        self._done.add(flight.node)
                    else:
                        self._counts[flight.node] += 1
                    if len(updates) == self._size:
                        break
                if len(updates) == self._size or self._clock.now() >= until:
                    break
                self._send_requests(start)
                if not self._in_flight and self._unavailable() >= set(self._strategy.query(self._grid)) > set():
                    break  # no device is left to wait for
                self._clock.wait(until)
            if late := self._stragglers.count(round=number):
                dropped["late"] = late
            requests = [flight.request for flight in ended]
            return training.finish(start, requests, updates, dropped, current=start.adapter)

    def _arrived(self, until: float, number: int) -> Iterator[tuple[_InFlight, list[Message]]]:
        """Yield requests with the reply that arrived, and expired requests without one."""
        now = self._clock.now()
        for name, reply in pull(self._grid, list(self._in_flight), max(FINAL_POLL, until - now)):
            yield self._in_flight.pop(name), [reply]
        due = [name for name, flight in self._in_flight.items() if now >= flight.until]
        for name, reply in pull(self._grid, due, FINAL_POLL / 2, last=True) if due else ():
            yield self._in_flight.pop(name), [reply]
        for name in due:
            if name in self._in_flight:
                self._stragglers.add([name], round=number)
                yield self._in_flight.pop(name), []

    def _rebased(self, start: RoundStart, flight: _InFlight, trained: Adapter) -> Adapter:
        current = flight.round == start.number and not flight.request.residual
        if current:  # the device started from the server's current adapter
            return trained
        age = start.number - flight.round
        return self._rebase(start.adapter, flight.request.adapter, trained, staleness_weight(age))

    def _send_requests(self, start: RoundStart) -> None:
        """Ask idle devices up to the concurrency, first those without an update in this round."""
        share = 1
        while len(self._in_flight) < self._concurrency and self._next_plan < PLANS_PER_ROUND:
            if self._ask(start, share):
                continue
            if share < self._max_share():
                share += 1
            elif self._counts and not self._in_flight and share < self._size and not self._strategy.private:
                share = self._size  # the other devices have left
            else:
                return

    def _unavailable(self) -> set[int]:
        """Return the nodes that are not asked again in this round, even if no other node is left."""
        return self._done | self._counts.keys() if self._strategy.private else self._done

    def _max_share(self) -> int:
        """Return the maximum number of updates of one device in this round."""
        if self._strategy.private:
            return 1
        eligible = {flight.node for flight in self._in_flight.values()} | self._counts.keys() | self._eligible
        return -(-self._size // max(1, len(eligible - self._done)))

    def _ask(self, start: RoundStart, share: int) -> bool:
        """Ask some of the nodes with fewer than `share` updates; False if there are none."""
        private, until = self._strategy.private, self._clock.now() + self._limits.timeout
        in_flight = {flight.node for flight in self._in_flight.values()}
        draw = plan_number(start.number, self._next_plan)
        request = self._strategy.training.request(
            start,
            self._grid,
            busy=in_flight | self._done | {node for node, count in self._counts.items() if count >= share},
            limit=self._concurrency - len(self._in_flight),
            plan_number=plan_number(start.number, 0) if private else draw,
            draw=draw,
        )
        self._eligible = request.eligible
        if not (messages := to_messages(request.messages)):
            return False
        self._next_plan += 1
        seconds = max(FINAL_POLL, self._until - self._clock.now())
        for name, message in zip(push(self._grid, messages, seconds), messages, strict=True):
            node = message.metadata.dst_node_id
            own = replace(
                request, messages={}, plans={node: request.plans[node]}, bytes_down=request.bytes_down // len(messages)
            )
            self._in_flight[name] = _InFlight(node=node, request=own, round=start.number, until=until)
            self._done |= {node} if private else set()
        return True
