"""`perform(base, jobs)`: run the jobs that clients requested, all of one kind together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from common.errors import AntherError
from conf.schemas import sampling
from models.base.base import Base
from models.diffusion.decoding import TILE
from models.lora.batched_lora import stack_adapters, to_device
from training.capacity import inference_share, training_share
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
from training.variants import Variant, list_variants

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
    """Run jobs. A job that fails yields its exception and doesn't affect the others.

    Args:
        base: the base.
        jobs: jobs of any clients.
        memory: bytes of the base's device for all jobs (`training.capacity.budget`). Training takes most of it, and
            keeps it for the next call.
        timesteps: number of fixed timesteps of a held-out loss.
        compiled: see `training.cohort.train`.
        cancelled: called between the passes of all jobs except training jobs, which have their own callback. If it
            returns True, the jobs of that kind yield Cancelled.

    Returns:
        Results in the order of the jobs.
    """
    results: list[Result | Exception] = [AntherError("not performed")] * len(jobs)

    def store_results(kind: type, outcomes: Sequence[Result | Exception]) -> None:
        rows = [row for row, job in enumerate(jobs) if isinstance(job, kind)]
        for row, result in zip(rows, outcomes, strict=True):
            results[row] = result

    inference_memory = inference_share(memory)
    pictures = [job for job in jobs if isinstance(job, EncodeJob)]
    store_results(EncodeJob, _unless_cancelled(pictures, lambda: encode(base, pictures, cancelled)))
    losses = [job for job in jobs if isinstance(job, MeasureJob)]
    store_results(
        MeasureJob, _unless_cancelled(losses, lambda: measure(base, losses, inference_memory, timesteps, cancelled))
    )
    per_example = [job for job in jobs if isinstance(job, MeasureEachJob)]
    store_results(
        MeasureEachJob,
        _unless_cancelled(per_example, lambda: measure_each(base, per_example, inference_memory, timesteps, cancelled)),
    )
    store_results(
        GenerateJob, [generate(base, job, inference_memory, cancelled) for job in jobs if isinstance(job, GenerateJob)]
    )
    training = [job for job in jobs if isinstance(job, TrainJob)]
    store_results(
        TrainJob, train(base, training, memory=training_share(memory), timesteps=timesteps, compiled=compiled)
    )
    return results


def _unless_cancelled(jobs: Sequence[Job], work: Callable[[], Sequence[T]]) -> Sequence[T | Exception]:
    try:
        return work()
    except Cancelled as error:
        return [error] * len(jobs)


def encode(base: Base, jobs: Sequence[EncodeJob], cancelled: Callable[[], bool] = never) -> list[Examples | Exception]:
    """Encode the pictures of all jobs at once, so that the encoders are loaded once, and freed.

    One picture's pixels are in memory at a time: each is reduced to the base's resolution before the next is read. A
    job with an unreadable picture yields that error.

    Args:
        base: the base.
        jobs: jobs.
        cancelled: called before every picture.

    Returns:
        Examples of each job, or its error.
    """

    def check_cancelled() -> None:
        if cancelled():
            raise Cancelled("stopped between two pictures")

    preprocessed = [_preprocess(base, job, check_cancelled) for job in jobs]
    valid = [(job, images) for job, images in zip(jobs, preprocessed, strict=True) if not isinstance(images, Exception)]
    if not valid:
        return [images for images in preprocessed if isinstance(images, Exception)]
    latents = base.encode_images([image for _, images in valid for image in images], check_cancelled).cpu()
    variants = [list_variants(job.pictures, job.options) for job, _ in valid]
    context = base.encode_captions([each.caption for listed in variants for each in listed], check_cancelled).cpu()
    parts = zip(
        valid,
        latents.split([len(images) for _, images in valid]),
        context.split([len(listed) for listed in variants]),
        variants,
        strict=True,
    )
    examples = (
        Examples(encoded[_image_indices(job, listed)], captions.clone())
        for (job, _), encoded, captions, listed in parts
    )
    return [images if isinstance(images, Exception) else next(examples) for images in preprocessed]


def _image_indices(job: EncodeJob, variants: Sequence[Variant]) -> list[int]:
    """Return the image of each variant among those that `_preprocess` returns: each picture, then its mirror image."""
    sides = 2 if job.options.flip else 1
    return [sides * each.picture + each.flipped for each in variants]


def _preprocess(base: Base, job: EncodeJob, check_cancelled: Callable[[], None]) -> list[np.ndarray] | Exception:
    """Preprocess a job's pictures for the base, each followed by its mirror image if the job asks for it."""
    preprocessed = []
    try:
        for picture in job.pictures:
            check_cancelled()
            image = base.preprocess(picture.at_least(base.resolution))
            preprocessed += [image, np.ascontiguousarray(image[:, ::-1])] if job.options.flip else [image]
    except AntherError as error:
        return error
    return preprocessed


def measure(
    base: Base, jobs: Sequence[MeasureJob], memory: int, timesteps: int, cancelled: Callable[[], bool] = never
) -> list[float]:
    """Compute held-out losses. Jobs with and without an adapter share passes.

    Args:
        base: the base.
        jobs: jobs.
        memory: bytes for all concurrent passes.
        timesteps: number of fixed timesteps.
        cancelled: called before every pass.
    """
    adapters = to_device(stack_adapters(base.sites, [job.adapter for job in jobs]), base.like)
    pools = [job.examples for job in jobs]
    return held_out_losses(base, pools, [adapters], timesteps=timesteps, memory=memory, cancelled=cancelled)


def measure_each(
    base: Base, jobs: Sequence[MeasureEachJob], memory: int, timesteps: int, cancelled: Callable[[], bool] = never
) -> list[Tensor]:
    """Compute the losses float64 [n] of the examples of each job, in separate passes.

    Args:
        base: the base.
        jobs: jobs.
        memory: bytes for all concurrent passes.
        timesteps: number of fixed timesteps.
        cancelled: called before every pass.
    """
    adapters = to_device(stack_adapters(base.sites, [job.adapter for job in jobs]), base.like)
    pools = [job.examples for job in jobs]
    return each_loss(base, pools, [adapters], timesteps=timesteps, memory=memory, cancelled=cancelled)


def generate(
    base: Base, job: GenerateJob, memory: int, cancelled: Callable[[], bool] = never
) -> GeneratedImages | Exception:
    """Generate one job's images, or return the error that prevented it.

    Args:
        base: the base.
        job: the job.
        memory: bytes for all concurrent passes.
        cancelled: called before every pass.
    """
    try:
        latents = generate_with(
            base,
            job.captions,
            job.adapters,
            seed=job.seed,
            sampler=sampling.SAMPLER,
            steps=job.steps,
            guidance=sampling.GUIDANCE_SCALE,
            memory=memory,
            guides=job.guides,
            cancelled=cancelled,
        )
        return GeneratedImages(base.decode(latents, tile=TILE))
    except Exception as error:  # affects this job only
        return error
