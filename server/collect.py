"""Replies to what was asked, as they come, for as long as they are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from strategies.clock import Clock


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
        late: ids of messages whose replies are not waited for any longer are put here.
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
        if late is not None:
            late.update(waiting)
