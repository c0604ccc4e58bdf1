"""Advance many request handlers together, so that the driver sees all of their jobs at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from protocol.messages import Reply
from training.jobs import Job, Result

K = TypeVar("K")
RequestHandler = Generator[Job, Result, Reply]


def run_handlers(
    handlers: Mapping[K, RequestHandler],
    perform: Callable[[list[Job]], Sequence[Result | Exception]],
) -> dict[K, Reply | Exception]:
    """Run handlers until each has replied or failed; one failure does not affect the others.

    Args:
        handlers: {key: generator returned by `client.rounds.handler.handle`}.
        perform: returns the results of the given jobs in their order. An exception among them is raised in the handler
            that requested the job. Called once per round of jobs.

    Returns:
        {key: reply, or the exception that ended the handler}, in the order of `handlers`.
    """
    outcomes: dict[K, Reply | Exception] = {}
    waiting: dict[K, Job] = {}

    def advance(key: K, step: Callable[[], Job]) -> None:
        try:
            waiting[key] = step()
        except StopIteration as end:
            outcomes[key] = end.value
        except Exception as error:
            outcomes[key] = error

    for key, handler in handlers.items():
        advance(key, partial(next, handler))
    while waiting:
        jobs = dict(waiting)
        waiting.clear()
        for (key, _), result in zip(jobs.items(), perform(list(jobs.values())), strict=True):
            handler = handlers[key]
            if isinstance(result, Exception):
                advance(key, partial(handler.throw, result))
            else:
                advance(key, partial(handler.send, result))
    return {key: outcomes[key] for key in handlers}
