"""Replies to what was asked, as they come, for as long as they are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from strategies.clock import Clock

_FORGOTTEN = 10  # rounds


@runtime_checkable
class Forgetful(Protocol):
    """A grid that keeps something of every message until its reply is pulled."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """No reply to these is going to be pulled."""
        ...


def give_up(grid: Grid, message_ids: Iterable[str]) -> None:
    """Have a grid forget messages that nobody asks for any more; Flower's own keep nothing."""
    if isinstance(grid, Forgetful):
        grid.forget(message_ids)


class Late:
    """Messages that are not waited for any more: replies that still come are counted, for some rounds."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._rounds: dict[str, int] = {}  # that each was given up in, by its id

    def add(self, message_ids: Iterable[str], *, round: int) -> None:
        self._rounds |= dict.fromkeys(message_ids, round)

    def came(self, *, round: int) -> int:
        """How many replies have come since; those that take too long are not looked for any more."""
        came = {name for name in self._rounds if list(self._grid.pull_messages([name]))}
        old = {name for name, before in self._rounds.items() if before <= round - _FORGOTTEN} - came
        give_up(self._grid, old)
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

    Each is pulled by itself, so that one that can't be unpacked harms no other.

    Args:
        until: on the clock.
        enough: asked after each reply.
        late: ids of messages whose replies are not waited for any longer are put here; None: they are given up.
    """
    waiting = list(dict.fromkeys(grid.push_messages(messages)))
    try:
        while waiting and not enough():
            for identifier in list(waiting):
                for reply in grid.pull_messages([identifier]):
                    waiting.remove(identifier)
                    yield reply
                if enough():
                    return
            if not waiting or clock.now() >= until:
                return
            clock.wait(until)
    finally:
        if late is None:
            give_up(grid, waiting)
        else:
            late.update(waiting)
