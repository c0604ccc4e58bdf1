"""Rounds of an asynchronous run: so many devices are at work at any time, and so many updates end a round (FedBuff)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from models.lora.adapter import Adapter, adapter_shapes, from_tensors
from protocol.records import adapter_from_record
from protocol.tensor_codec import decode
from server.rounds.collect import FINAL_POLL, StragglerTracker, pull, push
from server.rounds.sync import RoundLimits
from strategies.clock import WallClock
from strategies.fedbuff import PLANS_PER_ROUND, Rebase, plan_number, staleness_weight
from strategies.round.updates import RoundRequest, RoundUpdates
from strategies.strategy import Federated


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """One device at work."""

    node: int
    asked: RoundRequest
    round: int
    """That it was asked in."""
    until: float
    """When it is given up, on the clock."""


class FedBuffRunner:
    """Keeps devices at work from round to round; what is on its way when a run is killed is asked for again.

    A round has one update of a device: else the fastest one fills it, and no robust rule holds where one attacker is
    most of those it judges. Only where fewer than K devices can be asked, n of them, has each ⌈K / n⌉: what would be
    its share if all were as fast, so that a round is over however few there are.

    Where devices promise privacy each is asked once a round at most, under the number of the round alone: they have
    paid for as many rounds as there are, and whoever is asked again after a kill answers for the same one.

    Args:
        shift: puts an update of an older adapter on the current one.
        size: K, the updates of a round.
        concurrency: devices at work at any time.
    """

    def __init__(
        self, grid: Grid, strategy: Federated, pace: RoundLimits, *, shift: Rebase, size: int, concurrency: int
    ) -> None:
        self._grid, self._strategy, self._pace = grid, strategy, pace
        self._clock = pace.clock or WallClock()
        self._shift, self._size, self._concurrency = shift, size, concurrency
        self._flights: dict[str, _Flight] = {}  # by message id
        self._done: set[int] = set()  # nodes that are not asked again in this round
        self._gave: Counter[int] = Counter()  # updates of each node in this round
        self._place = 0  # of the next plan in this round
        self._until = 0.0  # when this round is over, on the clock
        self._late = StragglerTracker(grid)

    def train(self, number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """Aggregate the next K updates; fewer, if no more of them come in time."""
        current = from_tensors(decode(adapter_from_record(arrays), adapter_shapes(self._strategy.sites, -1)))
        self._until = until = self._clock.now() + self._pace.timeout
        self._done, self._gave, self._place = set(), Counter(), 0
        ended: list[_Flight] = []
        dropped: Counter[str] = Counter()
        self._send_out(number, arrays)
        with RoundUpdates() as found:
            while True:
                for flight, replies in self._landed(until, number):
                    ended.append(flight)
                    shift = partial(self._shifted, current, flight, number)
                    bad = self._strategy.accept_replies(flight.asked, replies, found, shift=shift)
                    dropped.update(bad)
                    if bad:
                        self._done.add(flight.node)
                    else:
                        self._gave[flight.node] += 1
                    if len(found) == self._size:
                        break
                if len(found) == self._size or self._clock.now() >= until:
                    break
                self._send_out(number, arrays)
                if not self._flights and self._over() >= set(self._strategy.query(self._grid)) > set():
                    break  # nobody is left to wait for
                self._clock.wait(until)
            if late := self._late.came(round=number):
                dropped["late"] = late
            return self._strategy.close(number, current, [flight.asked for flight in ended], found, dropped)

    def _landed(self, until: float, number: int) -> Iterator[tuple[_Flight, list[Message]]]:
        """Flights that a reply has come of, and those that are given up: without one."""
        now = self._clock.now()
        for name, reply in pull(self._grid, list(self._flights), max(FINAL_POLL, until - now)):
            yield self._flights.pop(name), [reply]
        due = [name for name, flight in self._flights.items() if now >= flight.until]
        for name, reply in pull(self._grid, due, FINAL_POLL / 2, last=True) if due else ():
            yield self._flights.pop(name), [reply]
        for name in due:
            if name in self._flights:
                self._late.add([name], round=number)
                yield self._flights.pop(name), []

    def _shifted(self, current: Adapter, flight: _Flight, number: int, trained: Adapter) -> Adapter:
        if flight.round == number and not flight.asked.lost:  # the device began where the server stands
            return trained
        return self._shift(current, flight.asked.adapter, trained, staleness_weight(number - flight.round))

    def _send_out(self, number: int, arrays: ArrayRecord) -> None:
        """Ask as many devices as there is room for: of those that are not at work, first who gave nothing yet."""
        share = 1
        while len(self._flights) < self._concurrency and self._place < PLANS_PER_ROUND:
            if self._ask(number, arrays, share):
                continue
            if share < self._share():
                share += 1
            elif self._gave and not self._flights and share < self._size and not self._strategy.private:
                share = self._size  # others were there, and have left
            else:
                return

    def _over(self) -> set[int]:
        """Who is not asked again in this round, however few there are."""
        return self._done | self._gave.keys() if self._strategy.private else self._done

    def _share(self) -> int:
        """Updates of one device in this round, at most."""
        if self._strategy.private:
            return 1
        eligible_nodes = (
            {flight.node for flight in self._flights.values()} | self._gave.keys() | self._strategy.eligible_nodes
        )
        return -(-self._size // max(1, len(eligible_nodes - self._done)))

    def _ask(self, number: int, arrays: ArrayRecord, share: int) -> bool:
        """Ask some of those that gave fewer updates than their share; whether there are any."""
        strategy, until = self._strategy, self._clock.now() + self._pace.timeout
        strategy.max_new = self._concurrency - len(self._flights)
        at_work = {flight.node for flight in self._flights.values()}
        strategy.busy_nodes = at_work | self._done | {node for node, count in self._gave.items() if count >= share}
        draw = plan_number(number, self._place)
        plan = plan_number(number, 0) if strategy.private else draw
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), self._grid, number=plan, draw=draw))
        asked = strategy.sent()
        if not messages:
            return False
        self._place += 1
        left = max(FINAL_POLL, self._until - self._clock.now())
        for name, message in zip(push(self._grid, messages, left), messages, strict=True):
            node = message.metadata.dst_node_id
            own = replace(asked, plans={node: asked.plans[node]}, bytes_down=asked.bytes_down // len(messages))
            self._flights[name] = _Flight(node=node, asked=own, round=number, until=until)
            self._done |= {node} if strategy.private else set()
        return True
