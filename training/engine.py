"""`perform(base, jobs)`: run whatever jobs clients have asked for, each kind together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from conf.errors import AntherError
from models.base import Base
from models.decoding import TILE
from models.slots import stack_adapters, to_device
from training.inference import draw_under, each_loss, held_out_losses
from training.jobs import Draw, Drawn, Encode, Examples, Job, Measure, MeasureEach, Result, Train
from training.memory import for_looking, for_training
from training.trainer import train


def perform(
    base: Base, jobs: Sequence[Job], *, memory: int, timesteps: int, compiled: bool = False
) -> list[Result | Exception]:
    """Results in the jobs' order; a job that fails yields its exception and harms no other.

    Args:
        memory: bytes of the base's device that jobs may take (`training.memory.budget`). Training takes most of it,
            and keeps it for the next time.
        timesteps: fixed timesteps of a held-out loss.
        compiled: as for `training.trainer.train`.
    """
    results: list[Result | Exception] = [AntherError("not performed")] * len(jobs)

    def place(kind: type, found: Sequence[Result | Exception]) -> None:
        rows = [row for row, job in enumerate(jobs) if isinstance(job, kind)]
        for row, result in zip(rows, found, strict=True):
            results[row] = result

    place(Encode, encode(base, [job for job in jobs if isinstance(job, Encode)]))
    place(Measure, measure(base, [job for job in jobs if isinstance(job, Measure)], for_looking(memory), timesteps))
    each = [job for job in jobs if isinstance(job, MeasureEach)]
    place(MeasureEach, measure_each(base, each, for_looking(memory), timesteps))
    place(Draw, [draw(base, job, for_looking(memory)) for job in jobs if isinstance(job, Draw)])
    training = [job for job in jobs if isinstance(job, Train)]
    place(Train, train(base, training, memory=for_training(memory), timesteps=timesteps, compiled=compiled))
    return results


def encode(base: Base, jobs: Sequence[Encode]) -> list[Examples | Exception]:
    """Encode all pictures in one go, so that the encoders are loaded once, and freed.

    One picture's pixels are in memory at a time: each is cut to the base's resolution before the next is read. A job
    with one that can't be read yields that error.
    """
    fitted = [_fitted(base, job) for job in jobs]
    good = [(job, images) for job, images in zip(jobs, fitted, strict=True) if not isinstance(images, Exception)]
    if not good:
        return [images for images in fitted if isinstance(images, Exception)]
    latents = base.encode_images([image for _, images in good for image in images]).cpu()
    context = base.encode_captions([picture.caption for job, _ in good for picture in job.pictures]).cpu()
    counts = [len(images) for _, images in good]
    parts = zip(latents.split(counts), context.split(counts), strict=True)
    examples = (Examples(latents.clone(), context.clone()) for latents, context in parts)
    return [images if isinstance(images, Exception) else next(examples) for images in fitted]


def _fitted(base: Base, job: Encode) -> list[np.ndarray] | Exception:
    """The job's pictures as the base sees them."""
    try:
        return [base.fit(picture.at_least(base.resolution)) for picture in job.pictures]
    except AntherError as error:
        return error


def measure(base: Base, jobs: Sequence[Measure], memory: int, timesteps: int) -> list[float]:
    """Held-out losses; jobs without an adapter share passes with those that have one."""
    adapters = to_device(stack_adapters(base.sites, [job.adapter for job in jobs]), base.like)
    pools = [job.examples for job in jobs]
    return held_out_losses(base, pools, [adapters], timesteps=timesteps, memory=memory)


def measure_each(base: Base, jobs: Sequence[MeasureEach], memory: int, timesteps: int) -> list[Tensor]:
    """Losses float64 [n] of every job's examples, each by itself."""
    adapters = to_device(stack_adapters(base.sites, [job.adapter for job in jobs]), base.like)
    pools = [job.examples for job in jobs]
    return each_loss(base, pools, [adapters], timesteps=timesteps, memory=memory)


def draw(base: Base, job: Draw, memory: int) -> Drawn | Exception:
    """One job's pictures, or what kept them from being drawn."""
    try:
        latents = draw_under(
            base, job.captions, job.adapters, seed=job.seed, sampler="dpm", steps=job.steps, guidance=1.5, memory=memory
        )
        return Drawn(base.decode(latents, tile=TILE))
    except Exception as error:  # whatever it is, it is this job's alone
        return error
