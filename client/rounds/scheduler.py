"""Advance many conversations together, so that whoever performs their jobs sees all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from protocol.messages import Reply
from training.jobs import Job, Result

K = TypeVar("K")
RequestHandler = Generator[Job, Result, Reply]


def run_handlers(
    conversations: Mapping[K, RequestHandler],
    perform: Callable[[list[Job]], Sequence[Result | Exception]],
) -> dict[K, Reply | Exception]:
    """The reply of each conversation, or the exception that ended it, which harms no other.

    Args:
        perform: results of the given jobs in their order; an exception among them is thrown into the conversation
            that asked for the job. Called once for each round of jobs.
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

    for key, conversation in conversations.items():
        advance(key, partial(next, conversation))
    while waiting:
        jobs = dict(waiting)
        waiting.clear()
        for (key, _), result in zip(jobs.items(), perform(list(jobs.values())), strict=True):
            conversation = conversations[key]
            if isinstance(result, Exception):
                advance(key, partial(conversation.throw, result))
            else:
                advance(key, partial(conversation.send, result))
    return {key: outcomes[key] for key in conversations}
