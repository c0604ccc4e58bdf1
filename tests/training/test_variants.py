"""Captions, mirror images and dropped captions: the examples of each picture, and the draws among them."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from privacy.noise import SimulatedNoise
from training.batches import BatchSampler
from training.jobs import DPSGD, Examples, TrainJob
from training.variants import PLAIN, Variant, VariantOptions, Variants, count_variants, list_variants


class _Shown:
    def __init__(self, *captions: str) -> None:
        self.captions = captions


PICTURES = [_Shown("a", "b", "c"), _Shown("d")]
ALL = VariantOptions(captions=True, flip=True, dropout=0.25)


def job(variants: Variants | None, count: int, **changes: object) -> TrainJob:
    examples = Examples(torch.arange(count).view(-1, 1, 1, 1).float(), torch.zeros(count, 1, 1))
    plain = TrainJob(
        client="a",
        round=1,
        purpose="personal",
        seed=0,
        examples=examples,
        variants=variants,
        start={},
        steps=1,
        batch_size=2,
        learning_rate=1.0,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_examples_of_each_picture() -> None:
    assert list_variants(PICTURES, PLAIN) == [Variant(0, False, "a"), Variant(1, False, "d")]
    assert count_variants(PICTURES, PLAIN) is None
    listed = list_variants(PICTURES, ALL)
    assert [each.caption for each in listed] == ["a", "a", "b", "b", "c", "c", None, None, "d", "d", None, None]
    assert [each.flipped for each in listed] == [False, True] * 6
    assert [each.picture for each in listed] == [0] * 8 + [1] * 4
    counted = count_variants(PICTURES, ALL)
    assert counted == Variants((6, 2), 2, 0.25)
    assert counted.examples == len(listed)
    assert counted.first.tolist() == [0, 8]


def test_draws_have_their_probabilities() -> None:
    """Every caption and side of a picture is equally likely; captions are dropped with probability 1/4."""
    counted = count_variants(PICTURES, ALL)
    sampler = BatchSampler(job(counted, 12))
    drawn = Counter(int(example) for _ in range(1500) for example in sampler.next().examples)
    shares = np.array([drawn[example] / 1500 for example in range(12)])
    expected = np.array([0.75 / 6] * 6 + [0.125] * 2 + [0.75 / 2] * 2 + [0.125] * 2)
    assert np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / 1500)


def test_draws_are_the_jobs_own() -> None:
    counted = count_variants(PICTURES, ALL)
    jobs = (job(counted, 12), job(counted, 12), job(counted, 12, seed=1), job(counted, 12, round=2))
    streams = [[sampler.next().examples.tolist() for _ in range(4)] for sampler in map(BatchSampler, jobs)]
    assert streams[0] == streams[1]
    assert len({str(stream) for stream in streams}) == 3


def test_variants_change_no_other_stream() -> None:
    """Pictures, timesteps and noise are the same with one example for each picture and with several."""
    several, plain = BatchSampler(job(count_variants(PICTURES, ALL), 12)), BatchSampler(job(None, 2))
    for _ in range(5):
        with_variants, without = several.next(), plain.next()
        assert (with_variants.examples >= 8).astype(int).tolist() == without.examples.tolist()
        assert np.array_equal(with_variants.phases, without.phases)
        assert np.array_equal(with_variants.noise_keys, without.noise_keys)


def test_first_variants() -> None:
    first = job(count_variants(PICTURES, ALL), 12).with_first_variants()
    assert (first.variants, first.pictures, first.examples.latents.flatten().tolist()) == (None, 2, [0, 8])


@pytest.mark.parametrize("wrong", ["private", "views", "count"])
def test_variants_that_do_not_fit_are_refused(wrong: str) -> None:
    plain = job(count_variants(PICTURES, ALL), 12)
    noise = SimulatedNoise(seed=0, client="a", round=1, purpose="shared")
    dp = DPSGD(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5)
    changes: dict[str, object] = {
        "private": {"privacy": dp, "noise": noise, "names": ("a", "b")},
        "views": {"views": 2},
        "count": {"variants": Variants((6, 3), 2, 0.25)},
    }[wrong]
    with pytest.raises(ValueError, match="variants need a job without privacy"):
        dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_weights_follow_the_first_variants() -> None:
    weights = torch.arange(12.0).view(12, 1, 1)
    first = job(count_variants(PICTURES, ALL), 12, loss_weights=weights).with_first_variants()
    assert first.loss_weights is not None
    assert first.loss_weights.flatten().tolist() == [0, 8]


@pytest.mark.parametrize("private", [False, True])
def test_weights_that_do_not_fit_are_refused(private: bool) -> None:
    noise = SimulatedNoise(seed=0, client="a", round=1, purpose="shared")
    dp = DPSGD(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5)
    changes: dict[str, object] = {"privacy": dp, "noise": noise, "names": ("a", "b")} if private else {}
    with pytest.raises(ValueError, match="loss weights need a job without privacy"):
        job(None, 2, loss_weights=torch.ones(2 if private else 3, 1, 1), **changes)
