"""Replies to what was asked, as they come, for as long as they are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from strategies.clock import Clock

_FORGOTTEN = 10  # rounds
FINAL_POLL = 1.0
"""Seconds that are left, once it is too late, to take what is there."""


@runtime_checkable
class Forgetful(Protocol):
    """A grid that keeps something of every message until its reply is pulled."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """No reply to these is going to be pulled."""
        ...


@runtime_checkable
class TimeLimitedGrid(Protocol):
    """A grid that does in a given time what can be done in it (`server.grid.validating_grid.ValidatingGrid`)."""

    def push(self, messages: Iterable[Message], seconds: float) -> list[str]:
        """Send messages; their ids."""
        ...

    def pull(self, message_ids: Iterable[str], seconds: float, *, last: bool = False) -> Iterator[tuple[str, Message]]:
        """Replies that are there, with the ids of what they answer; at the last look also what is wrong with others."""
        ...

    def came(self, message_ids: Iterable[str]) -> set[str]:
        """Those of these messages that there is a reply to, which is thrown away."""
        ...


def abandon_messages(grid: Grid, message_ids: Iterable[str]) -> None:
    """Have a grid forget messages that nobody asks for any more; Flower's own keep nothing."""
    if isinstance(grid, Forgetful):
        grid.forget(message_ids)


def push(grid: Grid, messages: Iterable[Message], seconds: float) -> list[str]:
    """Send messages; their ids."""
    return grid.push(messages, seconds) if isinstance(grid, TimeLimitedGrid) else list(grid.push_messages(messages))


def pull(
    grid: Grid, message_ids: Iterable[str], seconds: float, *, last: bool = False
) -> Iterator[tuple[str, Message]]:
    """Replies that are there, each with the id of the message that it answers.

    Args:
        seconds: that it may take, where the grid goes by the wall's clock.
        last: nobody looks for these again.
    """
    if isinstance(grid, TimeLimitedGrid):
        yield from grid.pull(message_ids, seconds, last=last)
        return
    for name in message_ids:
        for reply in grid.pull_messages([name]):
            yield name, reply


class StragglerTracker:
    """Messages that are not waited for any more: replies that still come are counted, for some rounds."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._rounds: dict[str, int] = {}  # that each was given up in, by its id

    def add(self, message_ids: Iterable[str], *, round: int) -> None:
        self._rounds |= dict.fromkeys(message_ids, round)

    def came(self, *, round: int) -> int:
        """How many replies have come since; those that take too long are not looked for any more."""
        grid = self._grid
        if isinstance(grid, TimeLimitedGrid):
            came = grid.came(self._rounds)
        else:
            came = {name for name, _ in pull(grid, list(self._rounds), 0.0)}
        old = {name for name, before in self._rounds.items() if before <= round - _FORGOTTEN} - came
        abandon_messages(grid, old)
        self._rounds = {name: before for name, before in self._rounds.items() if name not in came | old}
        return len(came)


def collect(
    grid: Grid,
    messages: Iterable[Message],
    clock: Clock,
    *,
    until: float,
    enough: Callable[[], bool] = lambda: False,
    late: set[str] | None = None,
) -> Iterator[Message]:
    """Replies as they come: until there is one to each message, there are enough, or it is too late.

    At the end of the time one more look takes what is there, which is over `FINAL_POLL` seconds later.

    Args:
        until: on the clock.
        enough: asked after each reply.
        late: ids of messages whose replies are not waited for any longer are put here; None: they are given up.
    """
    waiting = dict.fromkeys(push(grid, messages, max(FINAL_POLL, until - clock.now())))
    try:
        while waiting and not enough():
            last = clock.now() >= until
            seconds = until - clock.now() + (FINAL_POLL if last else 0.0)
            for name, reply in pull(grid, list(waiting), seconds, last=last):
                del waiting[name]
                yield reply
                if enough():
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
