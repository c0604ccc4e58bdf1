"""Batches: every picture in turn without privacy, and independent streams of private pictures."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from common import counter_rng
from privacy.noise import SimulatedNoise
from training.batches import BatchSampler, StepBatch, stratified
from training.jobs import DPSGD, Examples, Prior, TrainJob


class _FixedBatches(SimulatedNoise):
    """Noise source whose first Poisson batches are fixed; later ones have all pictures."""

    def __init__(self, *batches: list[int]) -> None:
        super().__init__(seed=0, client="a", round=1, purpose="shared")
        self._given_batches = iter(batches)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        batch = next(self._given_batches, None)
        return torch.arange(size) if batch is None else torch.tensor(batch, dtype=torch.long)


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
    return job(len(names), privacy=privacy, noise=noise or _FixedBatches(), names=tuple(names), **changes)


def steps(plan: TrainJob, count: int) -> list[StepBatch]:
    batches = BatchSampler(plan)
    return [batches.next() for _ in range(count)]


def equal_batches(one: StepBatch, other: StepBatch) -> bool:
    return one.per_unit == other.per_unit and all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def draws_of_entries(batch: StepBatch) -> list[tuple[float, ...]]:
    """Return the draws of each entry, without the index of its example."""
    return list(zip(batch.phases.tolist(), batch.noise_keys.tolist(), batch.weights.tolist(), strict=True))


@given(pictures=st.integers(1, 6), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_epoch_has_every_picture_once(pictures: int, size: int, seed: int) -> None:
    result = steps(job(pictures, batch_size=size, seed=seed), 2 * pictures)
    assert all(batch.size == size for batch in result)
    seen = np.concatenate([batch.examples for batch in result])
    for turn in seen.reshape(-1, pictures):
        assert sorted(turn.tolist()) == list(range(pictures))


def test_shuffles_are_uniform() -> None:
    seen = np.concatenate([batch.examples for batch in steps(job(6, batch_size=6), 50)]).reshape(-1, 6)
    assert len({tuple(turn) for turn in seen.tolist()}) > 45
    assert np.ptp(seen.mean(0)) < 1.8  # 7 standard errors of the mean at a position


@given(size=st.integers(1, 9), prior=st.booleans())
def test_weights_average_over_the_batch(size: int, prior: bool) -> None:
    plan = job(4, batch_size=size, prior=Prior(examples=examples(3), weight=0.25) if prior else None)
    batch = BatchSampler(plan).next()
    own = batch.part(slice(None, None, 2 if prior else 1))
    assert own.weights.tolist() == [1 / size] * size
    assert batch.per_unit == 1
    assert len(np.unique(batch.noise_keys)) == batch.size
    assert sorted((own.phases * size).astype(int).tolist()) == list(range(size))  # one in each stratum


@given(st.data())
def test_removing_pictures_keeps_the_draws_of_others(data: st.DataObject) -> None:
    """Needed for add/remove-one: otherwise the difference of the clipped sums is more than one picture's gradient."""
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
        for index, name in enumerate(rest):
            ours = less.part(slice(unit * index, unit * (index + 1)))
            before = whole.part(slice(unit * names.index(name), unit * (names.index(name) + 1)))
            assert draws_of_entries(ours) == draws_of_entries(before)
            own = slice(None, None, 2 if prior else 1)
            shift = views * (names.index(name) - index)
            assert (ours.examples[own] + shift).tolist() == before.examples[own].tolist()
            if prior:  # the same partners, whose indices follow the job's own examples
                shift = views * (len(names) - len(rest))
                assert (ours.examples[1::2] + shift).tolist() == before.examples[1::2].tolist()


def test_private_draws_are_independent_of_the_batch() -> None:
    single = steps(private("abcd", noise=_FixedBatches([2], [], [3])), 3)
    many = steps(private("abcd", noise=_FixedBatches([0, 1, 2], [1], [1, 3])), 3)
    assert draws_of_entries(single[0]) == draws_of_entries(many[0])[4:]
    assert draws_of_entries(single[2]) == draws_of_entries(many[2])[2:]


@pytest.mark.parametrize("plan", [job(3), private("abc")], ids=["plain", "private"])
def test_streams_differ_by_client_and_step(plan: TrainJob) -> None:
    one, two, three = steps(plan, 3)
    for before, after in ((one, two), (one, three), (two, three)):
        assert not set(before.noise_keys.tolist()) & set(after.noise_keys.tolist())
        assert not set(before.phases.tolist()) & set(after.phases.tolist())
    for again, before in zip(steps(plan, 3), (one, two, three), strict=True):
        assert equal_batches(again, before)
    for changed in ({"client": "b"}, {"round": 2}, {"purpose": "personal"}, {"seed": 1}):
        other = BatchSampler(dataclasses.replace(plan, **changed)).next()
        assert not set(other.noise_keys.tolist()) & set(one.noise_keys.tolist())
        assert not set(other.phases.tolist()) & set(one.phases.tolist())


def test_streams_are_independent_of_dp_noise() -> None:
    """The non-secret streams are the same under another noise source: neither is derived from the other."""
    one = BatchSampler(private("abc", noise=_FixedBatches())).next()
    secret = _FixedBatches()
    secret.rounded_gaussian(100, 1e6)
    assert equal_batches(BatchSampler(private("abc", noise=secret)).next(), one)


@pytest.mark.parametrize("prior", [None, Prior(examples=examples(2))], ids=["no prior", "prior"])
def test_empty_poisson_batch_is_empty(prior: Prior | None) -> None:
    plan = private("abc", noise=_FixedBatches([], [1], []), draws=2, prior=prior)
    for batch, expected in zip(steps(plan, 3), (0, 1, 0), strict=True):
        assert batch.size == expected * batch.per_unit
        assert [len(values) for values in batch[:4]] == [batch.size] * 4


def test_private_job_without_pictures() -> None:
    assert BatchSampler(private("")).next().size == 0


@given(views=st.integers(1, 4), draws=st.integers(1, 5), pictures=st.integers(1, 4))
def test_draws_cycle_through_views(views: int, draws: int, pictures: int) -> None:
    """Over all steps, no view is used twice before each was used once, and all views are of the same picture."""
    result = steps(private("abcdefgh"[:pictures], draws=draws, views=views), 4)
    for picture in range(pictures):
        units = [batch.examples[draws * picture : draws * (picture + 1)] for batch in result]
        seen = np.concatenate(units)
        assert (seen // views == picture).all()
        assert (seen % views == np.arange(len(seen)) % views).all()


@given(views=st.integers(1, 3), pictures=st.integers(1, 4), size=st.integers(1, 5))
def test_non_private_batch_uses_one_view_per_picture(views: int, pictures: int, size: int) -> None:
    result = steps(job(pictures, views=views, batch_size=size), 3 * views)
    for step, batch in enumerate(result):
        assert (batch.examples % views == step % views).all()
    turns = np.concatenate([batch.examples // views for batch in result])
    for turn in turns[: len(turns) // pictures * pictures].reshape(-1, pictures):
        assert sorted(turn.tolist()) == list(range(pictures))


@pytest.mark.parametrize("plan", [job(4, batch_size=5, views=2), private("abcd", views=2)], ids=["plain", "private"])
def test_every_entry_has_a_prior_partner(plan: TrainJob) -> None:
    bare = steps(plan, 40)
    paired = steps(dataclasses.replace(plan, prior=Prior(examples=examples(3), weight=0.5)), 40)
    for single, batch in zip(bare, paired, strict=True):
        own, partners = batch.part(slice(0, None, 2)), batch.part(slice(1, None, 2))
        assert equal_batches(own._replace(per_unit=single.per_unit), single)
        assert partners.phases.tolist() == own.phases.tolist()
        assert (partners.weights == own.weights * 0.5).all()
        assert ((partners.examples >= 8) & (partners.examples < 11)).all()
        assert len(np.unique(batch.noise_keys)) == batch.size
        assert batch.per_unit == (2 * single.per_unit if plan.privacy else 1)
    selected = np.concatenate([batch.examples[1::2] for batch in paired])
    counts = np.bincount(selected - 8, minlength=3)
    assert stats.chisquare(counts).pvalue > 1e-5  # all equally often


@given(start=st.floats(0, 1, exclude_max=True), strata=st.integers(1, 40))
def test_each_stratum_has_one_phase(start: float, strata: int) -> None:
    phases = stratified(np.float64(start), np.arange(strata), strata)
    assert ((phases >= 0) & (phases < 1)).all()
    gaps = np.diff(np.sort(phases), append=np.sort(phases)[0] + 1)
    assert gaps == pytest.approx(np.full(strata, 1 / strata), abs=1e-12)  # so no stratum is empty


def test_phases_are_uniform() -> None:
    batches = steps(job(3, batch_size=3), 2000)
    for index in range(3):
        assert stats.kstest([batch.phases[index] for batch in batches], "uniform").pvalue > 1e-6
    batches = steps(private("ab", draws=3), 2000)
    for index in range(6):
        assert stats.kstest([batch.phases[index] for batch in batches], "uniform").pvalue > 1e-6
    one, other = ([batch.phases[index] for batch in batches] for index in (0, 3))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(2000)  # between two pictures


def test_noise_is_independent_of_the_timestep() -> None:
    plain, drawn = steps(job(3, batch_size=3), 1000), steps(private("ab", draws=3), 500)
    for batches in (plain, drawn):
        phases = np.concatenate([batch.phases for batch in batches])
        keys = torch.from_numpy(np.concatenate([batch.noise_keys for batch in batches]))
        for normals in counter_rng.normals(keys, 4).T:
            assert abs(np.corrcoef(phases, normals)[0, 1]) < 5 / math.sqrt(len(phases))
            assert abs(np.corrcoef(phases, normals.square())[0, 1]) < 5 / math.sqrt(len(phases))


def test_part_slices_all_fields() -> None:
    batch = BatchSampler(private("abc", views=2)).next()
    part = batch.part(slice(2, 5))
    assert part.size == 3
    assert part.per_unit == batch.per_unit
    for values, whole in zip(part[:4], batch[:4], strict=True):
        assert values.tolist() == whole[2:5].tolist()
