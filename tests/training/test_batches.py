"""A client's random streams: every picture in turn, and private pictures that don't know each other."""

from __future__ import annotations

import torch
from torch import Tensor

from privacy.noise import Simulated
from training.batches import Batch, Batches
from training.jobs import DPSGD, Examples, Train


def sampled(rate: float) -> DPSGD:
    return DPSGD(noise_multiplier=1.0, clip=1.0, sampling_rate=rate, draws=2)


def job(count: int, names: str = "", client: str = "a", **changes: object) -> Train:
    """With names a private job, whose Poisson batch is everybody."""
    noise = Simulated(seed=0, client="a", round=1, purpose="shared")
    private = {"privacy": sampled(1.0), "noise": noise, "names": tuple(names)} if names else {}
    examples = Examples(torch.zeros(count, 1, 2, 2), torch.zeros(count, 1, 1))
    return Train(
        client=client, round=1, purpose="shared", seed=0, examples=examples,
        start={}, steps=1, batch_size=3, learning_rate=1.0, **{**private, **changes},
    )  # fmt: skip


def of_picture(batch: Batch, place: int) -> tuple[Tensor, Tensor]:
    return batch.t[2 * place : 2 * place + 2], batch.noise[2 * place : 2 * place + 2]


def test_every_picture_comes_once_before_any_comes_twice() -> None:
    batches = Batches(job(5), 1000)
    seen = torch.cat([batches.next().pictures for _ in range(5)])
    for turn in seen.split(5):
        assert sorted(turn.tolist()) == [0, 1, 2, 3, 4]


def test_a_batch_larger_than_the_pictures_repeats_them() -> None:
    assert Batches(job(2), 1000).next().pictures.tolist().count(0) in (1, 2)


def test_taking_a_picture_away_leaves_the_draws_of_the_others() -> None:
    """Add/remove-one: only then is the difference of the clipped sums one picture's gradient."""
    whole, less = Batches(job(4, "abcd"), 1000), Batches(job(3, "acd"), 1000)
    for _ in range(3):
        one, two = whole.next(), less.next()
        for place, (before, after) in {"a": (0, 0), "c": (2, 1), "d": (3, 2)}.items():
            for left, right in zip(of_picture(one, before), of_picture(two, after), strict=True):
                assert torch.equal(left, right), place


def test_the_stream_is_the_clients_own_and_new_at_each_step() -> None:
    batches = Batches(job(2, "ab"), 1000)
    one, two = batches.next(), batches.next()
    assert not torch.equal(one.noise, two.noise)
    assert torch.equal(Batches(job(2, "ab"), 1000).next().noise, one.noise)
    assert not torch.equal(Batches(job(2, "ab", client="b"), 1000).next().noise, one.noise)


def test_an_empty_poisson_batch_is_empty() -> None:
    batch = Batches(job(3, "abc", privacy=sampled(0.0)), 1000).next()
    assert len(batch.pictures) == len(batch.t) == len(batch.noise) == 0
