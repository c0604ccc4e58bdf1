"""`perform(base, jobs)`: run whatever jobs clients have asked for, each kind together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from common.errors import AntherError
from models.base.base import Base
from models.diffusion.decoding import TILE
from models.lora.batched_lora import stack_adapters, to_device
from training.cohort import train
from training.inference import each_loss, generate_with, held_out_losses
from training.jobs import (
    Cancelled,
    EncodeJob,
    Examples,
    GeneratedImages,
    GenerateJob,
    Job,
    MeasureEachJob,
    MeasureJob,
    Result,
    TrainJob,
    never,
)
from training.memory import inference_share, training_share

T = TypeVar("T")


def perform(
    base: Base,
    jobs: Sequence[Job],
    *,
    memory: int,
    timesteps: int,
    compiled: bool = False,
    cancelled: Callable[[], bool] = never,
) -> list[Result | Exception]:
    """Results in the jobs' order; a job that fails yields its exception and harms no other.

    Args:
        memory: bytes of the base's device that jobs may take (`training.memory.budget`). Training takes most of it,
            and keeps it for the next time.
        timesteps: fixed timesteps of a held-out loss.
        compiled: as for `training.cohort.train`.
        cancelled: asked between the passes of all that isn't training, whose jobs have such a question of their own;
            when it says so, the jobs of that kind yield Cancelled.
    """
    results: list[Result | Exception] = [AntherError("not performed")] * len(jobs)

    def place(kind: type, found: Sequence[Result | Exception]) -> None:
        rows = [row for row, job in enumerate(jobs) if isinstance(job, kind)]
        for row, result in zip(rows, found, strict=True):
            results[row] = result

    looking = inference_share(memory)
    pictures = [job for job in jobs if isinstance(job, EncodeJob)]
    place(EncodeJob, _unless_cancelled(pictures, lambda: encode(base, pictures, cancelled)))
    losses = [job for job in jobs if isinstance(job, MeasureJob)]
    place(MeasureJob, _unless_cancelled(losses, lambda: measure(base, losses, looking, timesteps, cancelled)))
    each = [job for job in jobs if isinstance(job, MeasureEachJob)]
    place(MeasureEachJob, _unless_cancelled(each, lambda: measure_each(base, each, looking, timesteps, cancelled)))
    place(GenerateJob, [draw(base, job, looking, cancelled) for job in jobs if isinstance(job, GenerateJob)])
    training = [job for job in jobs if isinstance(job, TrainJob)]
    place(TrainJob, train(base, training, memory=training_share(memory), timesteps=timesteps, compiled=compiled))
    return results


def _unless_cancelled(jobs: Sequence[Job], work: Callable[[], Sequence[T]]) -> Sequence[T | Exception]:
    try:
        return work()
    except Cancelled as error:
        return [error] * len(jobs)


def encode(base: Base, jobs: Sequence[EncodeJob], cancelled: Callable[[], bool] = never) -> list[Examples | Exception]:
    """Encode all pictures in one go, so that the encoders are loaded once, and freed.

    One picture's pixels are in memory at a time: each is cut to the base's resolution before the next is read. A job
    with one that can't be read yields that error.
    """

    def ask() -> None:
        if cancelled():
            raise Cancelled("stopped between two pictures")

    fitted = [_fitted(base, job, ask) for job in jobs]
    good = [(job, images) for job, images in zip(jobs, fitted, strict=True) if not isinstance(images, Exception)]
    if not good:
        return [images for images in fitted if isinstance(images, Exception)]
    latents = base.encode_images([image for _, images in good for image in images], ask).cpu()
    context = base.encode_captions([picture.caption for job, _ in good for picture in job.pictures], ask).cpu()
    counts = [len(images) for _, images in good]
    parts = zip(latents.split(counts), context.split(counts), strict=True)
    examples = (Examples(latents.clone(), context.clone()) for latents, context in parts)
    return [images if isinstance(images, Exception) else next(examples) for images in fitted]


def _fitted(base: Base, job: EncodeJob, ask: Callable[[], None]) -> list[np.ndarray] | Exception:
    """The job's pictures as the base sees them."""
    fitted = []
    try:
        for picture in job.pictures:
            ask()
            fitted.append(base.preprocess(picture.at_least(base.resolution)))
    except AntherError as error:
        return error
    return fitted


def measure(
    base: Base, jobs: Sequence[MeasureJob], memory: int, timesteps: int, cancelled: Callable[[], bool] = never
) -> list[float]:
    """Held-out losses; jobs without an adapter share passes with those that have one."""
    adapters = to_device(stack_adapters(base.sites, [job.adapter for job in jobs]), base.like)
    pools = [job.examples for job in jobs]
    return held_out_losses(base, pools, [adapters], timesteps=timesteps, memory=memory, cancelled=cancelled)


def measure_each(
    base: Base, jobs: Sequence[MeasureEachJob], memory: int, timesteps: int, cancelled: Callable[[], bool] = never
) -> list[Tensor]:
    """Losses float64 [n] of every job's examples, each by itself."""
    adapters = to_device(stack_adapters(base.sites, [job.adapter for job in jobs]), base.like)
    pools = [job.examples for job in jobs]
    return each_loss(base, pools, [adapters], timesteps=timesteps, memory=memory, cancelled=cancelled)


def draw(
    base: Base, job: GenerateJob, memory: int, cancelled: Callable[[], bool] = never
) -> GeneratedImages | Exception:
    """One job's pictures, or what kept them from being drawn."""
    try:
        latents = generate_with(
            base,
            job.captions,
            job.adapters,
            seed=job.seed,
            sampler="dpm",
            steps=job.steps,
            guidance=1.5,
            memory=memory,
            cancelled=cancelled,
        )
        return GeneratedImages(base.decode(latents, tile=TILE))
    except Exception as error:  # whatever it is, it is this job's alone
        return error
