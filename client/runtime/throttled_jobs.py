"""Wrap the function that performs jobs: throttle before and between jobs, and meter training.

    perform = with_throttle(with_meter(perform, meter), throttle)

If the throttle stops a job, `Cancelled` is raised in the handler that requested it, which ends without a reply. The
round stays charged and reserved. If the same plan is requested again, the device trains again under the same
reservation (`client.rounds.train`, `privacy.ledger`), so there is one release, whether training was paused, or stopped
and restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from client.runtime.throttle import Throttle
from training.jobs import Cancelled, Job, OutOfMemory, Result, TrainJob

Perform = Callable[[list[Job]], Sequence[Result | Exception]]


def with_throttle(perform: Perform, throttle: Throttle) -> Perform:
    """Check the throttle before every batch of jobs, and after every pass of training.

    Within other jobs, `training.engine.perform` checks it.
    """

    def throttled(batch: list[Job]) -> Sequence[Result | Exception]:
        if throttle():
            results: Sequence[Result | Exception] = [
                Cancelled(f"stopped before it started: {throttle.last_reason}") for _ in batch
            ]
        else:
            results = perform([_cancellable(job, throttle) for job in batch])
        if not throttle.out_of_memory:
            return results
        return [OutOfMemory(str(result)) if isinstance(result, Cancelled) else result for result in results]

    return throttled


def with_meter(perform: Perform, meter: AbstractContextManager[object]) -> Perform:
    """Run the meter during batches with training jobs; encoding and drawing aren't metered."""

    def metered(batch: list[Job]) -> Sequence[Result | Exception]:
        if not any(isinstance(job, TrainJob) for job in batch):
            return perform(batch)
        with meter:
            return perform(batch)

    return metered


def wait(throttle: Throttle, seconds: float) -> None:
    """Wait this many seconds. Raises Cancelled if the device is stopped meanwhile."""
    if throttle.stop.wait(seconds):
        raise Cancelled("stopped while a reply waited for its public time")


def _cancellable(job: Job, throttle: Throttle) -> Job:
    """Make a training job stop if the throttle or its requester cancels it."""
    if not isinstance(job, TrainJob):
        return job
    requested = job.cancelled
    return replace(job, cancelled=lambda: requested() or throttle())
