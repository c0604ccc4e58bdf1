"""Prior preservation: pictures of the base without an adapter, in the training of the LoRA on top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.lib.tiny import ATTENTION
from common.errors import AntherError
from conf.schemas import sampling
from models.base.base import Base
from models.lora.adapter import init_adapter
from tests.helpers.devices import SITES
from tests.helpers.driven import drive, plain_job
from training import engine
from training.jobs import (
    EncodeJob,
    Examples,
    GeneratedImages,
    GenerateJob,
    Job,
    MeasureJob,
    Prior,
    Result,
    TrainedAdapter,
    TrainJob,
)
from training.personalization import build
from training.personalization.prior import PriorPreservation

CAPTIONS = ["a dog", "a cat", "a dog"]


@pytest.mark.parametrize("channels", [(), (3,)])
def test_base_draws_for_each_caption(channels: tuple[int, ...]) -> None:
    """Each drawn picture keeps its own caption; the base draws without an adapter."""
    shared, on_top = init_adapter(SITES, 2, 1), init_adapter(SITES, 1, 2)
    trained = TrainedAdapter(init_adapter(SITES, 1, 3), 0.1, 2)
    encoded = Examples(torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2))
    drawn = iter(range(100))

    def answer(job: Job) -> Result:
        if isinstance(job, GenerateJob):
            pictures = [np.full((4, 4, *channels), next(drawn), np.uint8) for _ in job.captions]
            return GeneratedImages(np.stack(pictures))
        return encoded if isinstance(job, EncodeJob) else trained

    method, job = PriorPreservation(pictures=2, weight=0.3), plain_job(on_top, frozen=shared)
    result, (first, second, encode, train) = drive(method.fit(job, shared, CAPTIONS), answer)
    assert isinstance(first, GenerateJob)
    assert isinstance(second, GenerateJob)
    assert (first.captions, first.adapters, first.steps) == (["a dog", "a cat"], (), sampling.STEPS)
    assert second == replace(first, seed=second.seed)
    assert second.seed != first.seed
    assert isinstance(encode, EncodeJob)
    content = [(int(picture.pixels.mean()), picture.pixels.ndim, picture.caption) for picture in encode.pictures]
    kinds = 2 + len(channels)
    assert content == [(0, kinds, "a dog"), (1, kinds, "a cat"), (2, kinds, "a dog"), (3, kinds, "a cat")]
    assert train == replace(job, prior=Prior(examples=encoded, weight=0.3))
    assert result is trained.adapter


@pytest.mark.parametrize(("options", "reason"), [({"pictures": 0.0}, "1 or more"), ({"weight": 0.0}, "over 0")])
def test_options_are_checked(options: dict[str, float], reason: str) -> None:
    with pytest.raises(AntherError, match=rf"^personalization\.\w+=\S+: must be {reason}$"):
        build("prior", options)


@pytest.mark.integration
def test_prior_pictures_are_kept(pipeline_folder: Path) -> None:
    """With a large weight, training on other pictures raises the loss on the base's own pictures less."""
    base = Base(pipeline_folder, sites=ATTENTION, compute="fp32")

    def answer(job: Job) -> Result:
        (result,) = engine.perform(base, [job], memory=2**30, timesteps=4)
        assert not isinstance(result, Exception)
        return result

    start = init_adapter(base.sites, 4, 0)
    noise = torch.Generator().manual_seed(1)
    losses = []
    for weight in (1e-6, 30.0):
        own = Examples(3 * torch.randn(4, *base.shape, generator=noise), base.encode_captions(["a"] * 4))
        job = plain_job(start, examples=own, steps=30, learning_rate=0.02)
        work = PriorPreservation(pictures=4, weight=weight).fit(job, {}, ["a"])
        adapter, done = drive(work, answer)
        train = done[-1]
        assert isinstance(train, TrainJob)
        assert train.prior
        losses.append(answer(MeasureJob(examples=train.prior.examples, adapter=adapter)))
    assert losses[1] < losses[0]  # type: ignore[operator]
