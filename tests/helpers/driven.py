"""Run the generator of a method of personalization with an answer for each job."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

import torch

from models.lora.adapter import Adapter
from training.jobs import Examples, Job, Result, TrainJob

T = TypeVar("T")


def plain_job(start: Adapter, pictures: int = 3, **changes: object) -> TrainJob:
    """Return a job on pictures with the numbers 0, 1, … as pixels."""
    images = torch.arange(pictures, dtype=torch.float32)[:, None, None, None]
    settings: dict[str, object] = {
        "client": "d",
        "round": 3,
        "purpose": "shared",
        "seed": 0,
        "examples": Examples(images, images[..., 0]),
        "start": start,
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 0.1,
    }
    return TrainJob(**{**settings, **changes})  # type: ignore[arg-type]


def drive(work: Generator[Job, Result, T], answer: Callable[[Job], Result]) -> tuple[T, list[Job]]:
    """Run a generator.

    Args:
        work: the generator.
        answer: returns the result of a job.

    Returns:
        The generator's result, and its jobs.
    """
    done: list[Job] = []
    try:
        job = next(work)
        while True:
            done.append(job)
            job = work.send(answer(job))
    except StopIteration as finished:
        return finished.value, done
