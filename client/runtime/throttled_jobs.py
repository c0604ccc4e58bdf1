"""Whoever performs jobs (`client.rounds.scheduler`), with a guard before and between them, and with a meter beside them.

    perform = with_guard(measured(perform, meter), guard)

A job that the guard stops raises `Cancelled` in the conversation that asked for it, which ends without a reply. What
was charged stays charged and reserved; asked again for the same plan, the device trains anew under the same reservation
(`client.rounds.train`, `privacy.ledger.ledger`), so that there is one release whether training waited, or stopped and began again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from client.runtime.throttle import Guard
from training.jobs import Cancelled, Job, Result, TrainJob

Perform = Callable[[list[Job]], Sequence[Result | Exception]]


class OutOfMemory(Cancelled):
    """The guard stopped for want of memory, which what was asked for may itself have taken."""


def with_throttle(perform: Perform, guard: Guard) -> Perform:
    """The same, asking the guard before any job, and within training after every pass.

    Within other jobs whoever performs them asks it (`training.engine.perform`).
    """

    def guarded(batch: list[Job]) -> Sequence[Result | Exception]:
        if guard():
            found: Sequence[Result | Exception] = [
                Cancelled(f"stopped before it began: {guard.last_reason}") for _ in batch
            ]
        else:
            found = perform([_asking(job, guard) for job in batch])
        if not guard.out_of_memory:
            return found
        return [OutOfMemory(str(result)) if isinstance(result, Cancelled) else result for result in found]

    return guarded


def measured(perform: Perform, meter: AbstractContextManager[object]) -> Perform:
    """The same, within the meter while anything is trained: pictures that are encoded or drawn aren't training."""

    def metered(batch: list[Job]) -> Sequence[Result | Exception]:
        if not any(isinstance(job, TrainJob) for job in batch):
            return perform(batch)
        with meter:
            return perform(batch)

    return metered


def wait(guard: Guard, seconds: float) -> None:
    """Let so many seconds pass. Raises Cancelled if the device is to stop meanwhile."""
    if guard.stop.wait(seconds):
        raise Cancelled("stopped while a reply waited for its time")


def _asking(job: Job, guard: Guard) -> Job:
    """A job that stops when the guard says so, or when whoever asked for it says so."""
    if not isinstance(job, TrainJob):
        return job
    theirs = job.cancelled
    return replace(job, cancelled=lambda: theirs() or guard())
