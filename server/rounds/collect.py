"""Collect replies as they arrive, within a time limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from strategies.clock import Clock

_MAX_AGE = 10  # rounds after which a late reply is no longer expected
FINAL_POLL = 1.0
"""Seconds for a final poll after the time limit, which takes the replies that have arrived."""


@runtime_checkable
class Forgetful(Protocol):
    """Grid that keeps state for every message until its reply is pulled."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Stop waiting for replies to these messages."""
        ...


@runtime_checkable
class TimeLimitedGrid(Protocol):
    """Grid whose operations have a time limit (`server.grid.validating_grid.ValidatingGrid`)."""

    def push(self, messages: Iterable[Message], seconds: float) -> list[str]:
        """Send messages, and return their ids."""
        ...

    def pull(self, message_ids: Iterable[str], seconds: float, *, last: bool = False) -> Iterator[tuple[str, Message]]:
        """Yield replies that have arrived, each with the id of its request.

        Args:
            message_ids: ids of the requests.
            seconds: time limit.
            last: also report failed replies: there is no further poll.
        """
        ...

    def discard_replies(self, message_ids: Iterable[str]) -> set[str]:
        """Discard the replies that have arrived for these messages, and return the ids of their requests."""
        ...


def abandon_messages(grid: Grid, message_ids: Iterable[str]) -> None:
    """Make a grid forget messages whose replies are no longer expected; Flower's own grids keep no state."""
    if isinstance(grid, Forgetful):
        grid.forget(message_ids)


def push(grid: Grid, messages: Iterable[Message], seconds: float) -> list[str]:
    """Send messages, and return their ids.

    Args:
        grid: any grid.
        messages: messages to send.
        seconds: time limit, for a grid with time limits.
    """
    return grid.push(messages, seconds) if isinstance(grid, TimeLimitedGrid) else list(grid.push_messages(messages))


def pull(
    grid: Grid, message_ids: Iterable[str], seconds: float, *, last: bool = False
) -> Iterator[tuple[str, Message]]:
    """Yield replies that have arrived, each with the id of its request.

    Args:
        grid: any grid.
        message_ids: ids of the requests.
        seconds: time limit, for a grid with time limits.
        last: whether this is the last poll for these messages.
    """
    if isinstance(grid, TimeLimitedGrid):
        yield from grid.pull(message_ids, seconds, last=last)
        return
    for name in message_ids:
        for reply in grid.pull_messages([name]):
            yield name, reply


class StragglerTracker:
    """Messages that are no longer waited for; replies that still arrive are counted, for some rounds."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._rounds: dict[str, int] = {}  # round in which each message was abandoned, by message id

    def add(self, message_ids: Iterable[str], *, round: int) -> None:
        """Track messages that were abandoned in a round."""
        self._rounds |= dict.fromkeys(message_ids, round)

    def count(self, *, round: int) -> int:
        """Count the replies that have arrived since the last call, and forget messages after some rounds."""
        grid = self._grid
        if isinstance(grid, TimeLimitedGrid):
            arrived = grid.discard_replies(self._rounds)
        else:
            arrived = {name for name, _ in pull(grid, list(self._rounds), 0.0)}
        expired = {name for name, sent in self._rounds.items() if sent <= round - _MAX_AGE} - arrived
        abandon_messages(grid, expired)
        self._rounds = {name: sent for name, sent in self._rounds.items() if name not in arrived | expired}
        return len(arrived)


def collect(
    grid: Grid,
    messages: Iterable[Message],
    clock: Clock,
    *,
    until: float,
    is_complete: Callable[[], bool] = lambda: False,
    late: set[str] | None = None,
) -> Iterator[Message]:
    """Send messages, and yield replies as they arrive.

    Collection ends when every message has a reply, when `is_complete` returns True, or at the time limit. At the time
    limit, a final poll of at most `FINAL_POLL` seconds takes the replies that have arrived.

    Args:
        grid: any grid.
        messages: requests to send.
        clock: clock of the time limit.
        until: the time limit, on the clock.
        is_complete: called after each reply; True ends the collection.
        late: receives the ids of messages without a reply; None: the grid forgets them.
    """
    waiting = dict.fromkeys(push(grid, messages, max(FINAL_POLL, until - clock.now())))
    try:
        while waiting and not is_complete():
            last = clock.now() >= until
            seconds = until - clock.now() + (FINAL_POLL if last else 0.0)
            for name, reply in pull(grid, list(waiting), seconds, last=last):
                del waiting[name]
                yield reply
                if is_complete():
                    return
            if not waiting or last:
                return
            if clock.now() < until:
                clock.wait(until)
    finally:
        if late is None:
            abandon_messages(grid, waiting)
        else:
            late.update(waiting)
