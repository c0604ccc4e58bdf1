"""A client's random streams: every picture in turn, and private pictures that don't know each other."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from common import counter_rng
from privacy.noise import SimulatedNoise
from training.batches import BatchSampler, StepBatch, stratified
from training.jobs import DPSGD, Examples, Prior, TrainJob


class Dictated(SimulatedNoise):
    """A noise source whose Poisson batches are dictated, and everybody after that."""

    def __init__(self, *batches: list[int]) -> None:
        super().__init__(seed=0, client="a", round=1, purpose="shared")
        self._dictated = iter(batches)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        dictated = next(self._dictated, None)
        return torch.arange(size) if dictated is None else torch.tensor(dictated, dtype=torch.long)


def examples(count: int) -> Examples:
    return Examples(torch.zeros(count, 1, 2, 2), torch.zeros(count, 1, 1))


def job(pictures: int, *, views: int = 1, **changes: object) -> TrainJob:
    plain = TrainJob(
        client="a",
        round=1,
        purpose="shared",
        seed=0,
        examples=examples(pictures * views),
        views=views,
        start={},
        steps=1,
        batch_size=3,
        learning_rate=1.0,
    )
    return dataclasses.replace(plain, **changes)


def private(names: str, *, draws: int = 2, noise: SimulatedNoise | None = None, **changes: object) -> TrainJob:
    privacy = DPSGD(noise_multiplier=1.0, clip=1.0, sampling_rate=1.0, draws=draws)
    return job(len(names), privacy=privacy, noise=noise or Dictated(), names=tuple(names), **changes)


def steps(plan: TrainJob, count: int) -> list[StepBatch]:
    batches = BatchSampler(plan)
    return [batches.next() for _ in range(count)]


def same(one: StepBatch, other: StepBatch) -> bool:
    return one.per_unit == other.per_unit and all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def rows(batch: StepBatch) -> list[tuple[float, ...]]:
    """What each entry draws, whichever example it is."""
    return list(zip(batch.phases.tolist(), batch.noise_keys.tolist(), batch.weights.tolist(), strict=True))


@given(pictures=st.integers(1, 6), size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_every_picture_comes_once_before_any_comes_twice(pictures: int, size: int, seed: int) -> None:
    found = steps(job(pictures, batch_size=size, seed=seed), 2 * pictures)
    assert all(batch.size == size for batch in found)
    seen = np.concatenate([batch.examples for batch in found])
    for turn in seen.reshape(-1, pictures):
        assert sorted(turn.tolist()) == list(range(pictures))


def test_shuffles_are_shuffles() -> None:
    seen = np.concatenate([batch.examples for batch in steps(job(6, batch_size=6), 50)]).reshape(-1, 6)
    assert len({tuple(turn) for turn in seen.tolist()}) > 45
    assert np.ptp(seen.mean(0)) < 1.8  # 7 standard errors of what stands at a place


@given(size=st.integers(1, 9), prior=st.booleans())
@settings(deadline=None)
def test_a_batch_is_the_mean_over_its_entries(size: int, prior: bool) -> None:
    plan = job(4, batch_size=size, prior=Prior(examples=examples(3), weight=0.25) if prior else None)
    batch = BatchSampler(plan).next()
    own = batch.part(slice(None, None, 2 if prior else 1))
    assert own.weights.tolist() == [1 / size] * size
    assert batch.per_unit == 1
    assert len(np.unique(batch.noise_keys)) == batch.size
    assert sorted((own.phases * size).astype(int).tolist()) == list(range(size))  # one in each stratum


@given(st.data())
@settings(deadline=None)
def test_taking_pictures_away_leaves_the_draws_of_the_others(data: st.DataObject) -> None:
    """Add/remove-one: only then is the difference of the clipped sums one picture's gradient."""
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
    rest = data.draw(st.lists(st.sampled_from(names), unique=True))  # in any order
    draws, views = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    prior = Prior(examples=examples(3)) if data.draw(st.booleans()) else None
    for whole, less in zip(
        steps(private("".join(names), draws=draws, views=views, prior=prior), 3),
        steps(private("".join(rest), draws=draws, views=views, prior=prior), 3),
        strict=True,
    ):
        unit = whole.per_unit
        assert unit == less.per_unit == draws * (2 if prior else 1)
        assert (whole.size, less.size) == (unit * len(names), unit * len(rest))
        for place, name in enumerate(rest):
            mine = less.part(slice(unit * place, unit * (place + 1)))
            before = whole.part(slice(unit * names.index(name), unit * (names.index(name) + 1)))
            assert rows(mine) == rows(before)
            own = slice(None, None, 2 if prior else 1)
            shift = views * (names.index(name) - place)
            assert (mine.examples[own] + shift).tolist() == before.examples[own].tolist()
            if prior:  # the same partners, whose places count on from the job's own examples
                shift = views * (len(names) - len(rest))
                assert (mine.examples[1::2] + shift).tolist() == before.examples[1::2].tolist()


def test_a_private_picture_draws_the_same_whoever_else_was_sampled() -> None:
    alone = steps(private("abcd", noise=Dictated([2], [], [3])), 3)
    many = steps(private("abcd", noise=Dictated([0, 1, 2], [1], [1, 3])), 3)
    assert rows(alone[0]) == rows(many[0])[4:]
    assert rows(alone[2]) == rows(many[2])[2:]


@pytest.mark.parametrize("plan", [job(3), private("abc")], ids=["plain", "private"])
def test_the_stream_is_the_clients_own_and_new_at_each_step(plan: TrainJob) -> None:
    one, two, three = steps(plan, 3)
    for before, after in ((one, two), (one, three), (two, three)):
        assert not set(before.noise_keys.tolist()) & set(after.noise_keys.tolist())
        assert not set(before.phases.tolist()) & set(after.phases.tolist())
    for again, before in zip(steps(plan, 3), (one, two, three), strict=True):
        assert same(again, before)
    for changed in ({"client": "b"}, {"round": 2}, {"purpose": "personal"}, {"seed": 1}):
        other = BatchSampler(dataclasses.replace(plan, **changed)).next()
        assert not set(other.noise_keys.tolist()) & set(one.noise_keys.tolist())
        assert not set(other.phases.tolist()) & set(one.phases.tolist())


def test_timesteps_and_noise_tell_nothing_of_dp_noise() -> None:
    """The ordinary stream is the same under another source of noise: neither is drawn from the other."""
    one = BatchSampler(private("abc", noise=Dictated())).next()
    secret = Dictated()
    secret.rounded_gaussian(100, 1e6)
    assert same(BatchSampler(private("abc", noise=secret)).next(), one)


@pytest.mark.parametrize("prior", [None, Prior(examples=examples(2))], ids=["alone", "prior"])
def test_an_empty_poisson_batch_is_empty(prior: Prior | None) -> None:
    plan = private("abc", noise=Dictated([], [1], []), draws=2, prior=prior)
    for batch, wanted in zip(steps(plan, 3), (0, 1, 0), strict=True):
        assert batch.size == wanted * batch.per_unit
        assert [len(values) for values in batch[:4]] == [batch.size] * 4


def test_no_pictures_at_all() -> None:
    assert BatchSampler(private("")).next().size == 0


@given(views=st.integers(1, 4), draws=st.integers(1, 5), pictures=st.integers(1, 4))
@settings(deadline=None)
def test_a_picture_goes_through_its_views_in_turn(views: int, draws: int, pictures: int) -> None:
    """Over all steps: no view comes a second time before each has come once, and none of another picture."""
    found = steps(private("abcdefgh"[:pictures], draws=draws, views=views), 4)
    for picture in range(pictures):
        units = [batch.examples[draws * picture : draws * (picture + 1)] for batch in found]
        seen = np.concatenate(units)
        assert (seen // views == picture).all()
        assert (seen % views == np.arange(len(seen)) % views).all()


@given(views=st.integers(1, 3), pictures=st.integers(1, 4), size=st.integers(1, 5))
@settings(deadline=None)
def test_a_plain_batch_takes_one_view_of_each_picture(views: int, pictures: int, size: int) -> None:
    found = steps(job(pictures, views=views, batch_size=size), 3 * views)
    for step, batch in enumerate(found):
        assert (batch.examples % views == step % views).all()
    turns = np.concatenate([batch.examples // views for batch in found])
    for turn in turns[: len(turns) // pictures * pictures].reshape(-1, pictures):
        assert sorted(turn.tolist()) == list(range(pictures))


@pytest.mark.parametrize("plan", [job(4, batch_size=5, views=2), private("abcd", views=2)], ids=["plain", "private"])
def test_every_entry_has_a_partner_of_the_prior(plan: TrainJob) -> None:
    bare = steps(plan, 40)
    paired = steps(dataclasses.replace(plan, prior=Prior(examples=examples(3), weight=0.5)), 40)
    for alone, batch in zip(bare, paired, strict=True):
        own, partners = batch.part(slice(0, None, 2)), batch.part(slice(1, None, 2))
        assert same(own._replace(per_unit=alone.per_unit), alone)
        assert partners.phases.tolist() == own.phases.tolist()
        assert (partners.weights == own.weights * 0.5).all()
        assert ((partners.examples >= 8) & (partners.examples < 11)).all()
        assert len(np.unique(batch.noise_keys)) == batch.size
        assert batch.per_unit == (2 * alone.per_unit if plan.privacy else 1)
    chosen = np.concatenate([batch.examples[1::2] for batch in paired])
    counts = np.bincount(chosen - 8, minlength=3)
    assert stats.chisquare(counts).pvalue > 1e-5  # each as often as another


@given(start=st.floats(0, 1, exclude_max=True), strata=st.integers(1, 40))
def test_one_phase_in_each_stratum(start: float, strata: int) -> None:
    phases = stratified(np.float64(start), np.arange(strata), strata)
    assert ((phases >= 0) & (phases < 1)).all()
    gaps = np.diff(np.sort(phases), append=np.sort(phases)[0] + 1)
    assert gaps == pytest.approx(np.full(strata, 1 / strata), abs=1e-12)  # so none is without one


def test_every_phase_is_uniform() -> None:
    batches = steps(job(3, batch_size=3), 2000)
    for place in range(3):
        assert stats.kstest([batch.phases[place] for batch in batches], "uniform").pvalue > 1e-6
    batches = steps(private("ab", draws=3), 2000)
    for place in range(6):
        assert stats.kstest([batch.phases[place] for batch in batches], "uniform").pvalue > 1e-6
    one, other = ([batch.phases[place] for batch in batches] for place in (0, 3))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(2000)  # of two pictures


def test_the_noise_does_not_know_its_timestep() -> None:
    plain, drawn = steps(job(3, batch_size=3), 1000), steps(private("ab", draws=3), 500)
    for batches in (plain, drawn):
        phases = np.concatenate([batch.phases for batch in batches])
        keys = torch.from_numpy(np.concatenate([batch.noise_keys for batch in batches]))
        for normals in counter_rng.normals(keys, 4).T:
            assert abs(np.corrcoef(phases, normals)[0, 1]) < 5 / math.sqrt(len(phases))
            assert abs(np.corrcoef(phases, normals.square())[0, 1]) < 5 / math.sqrt(len(phases))


def test_a_part_is_a_part_of_everything() -> None:
    batch = BatchSampler(private("abc", views=2)).next()
    part = batch.part(slice(2, 5))
    assert part.size == 3
    assert part.per_unit == batch.per_unit
    for values, whole in zip(part[:4], batch[:4], strict=True):
        assert values.tolist() == whole[2:5].tolist()
