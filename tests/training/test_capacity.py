"""Memory budget: never exceeded, at least one job and one entry, and well used."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from common.errors import AntherError
from models.base.base import Base
from models.lora.batched_lora import stack_adapters
from tests.helpers.reference_trainer import (
    PLENTY,
    assert_close,
    at_some_sites,
    examples,
    job,
    memory_for,
    minimum_memory,
    nonzero_adapter,
    private,
    trained_adapter,
)
from tests.helpers.samples import sampled
from training import cohort, passes
from training.batches import BatchSampler
from training.buffers import BufferSpec, row_bytes
from training.capacity import InsufficientMemoryError, capacity, entry_bytes, expected_entries, peak_bytes
from training.cohort import train
from training.inference import held_out_losses
from training.jobs import EarlyStopping, Prior, TrainedAdapter, TrainJob

Pick = random.Random


def random_job(base: Base, client: str, pick: Pick, frozen: list[Any], rates: list[float]) -> TrainJob:
    changes: dict[str, object] = {"frozen": pick.choice(frozen), "steps": pick.choice([0, 1, 1, 2])}
    rank = pick.choice([1, 2, 4, 8, 16])
    if pick.random() < 0.3:
        changes["start"] = at_some_sites(nonzero_adapter(base, rank, 3), pick.choice([2, 5]))
    if pick.random() < 0.2:
        changes["prior"] = Prior(examples=examples(base, pick.choice([1, 3]), 5))
    if pick.random() < 0.5:
        count, draws, views = pick.choice([1, 2, 5]), pick.choice([1, 1, 2, 5]), pick.choice([1, 1, 2])
        return private(base, client, pick.choice(rates), count, rank=rank, draws=draws, views=views, **changes)
    return job(base, client, rank, pick.choice([1, 2, 5]), batch_size=pick.choice([1, 1, 2, 4]), **changes)


def random_jobs(base: Base, pick: Pick) -> list[TrainJob]:
    """Draw jobs with equal shapes of examples; sometimes with a common frozen adapter, or with mostly empty batches."""
    many = [None, nonzero_adapter(base, pick.choice([1, 3]), 9), nonzero_adapter(base, 24, 8)]
    frozen = pick.choice([many[:1], many[1:2], many[2:], many])
    rates = pick.choice([[0.02, 0.05], [0.1, 0.5, 1.0]])
    count = pick.choice([1, 2, 3, 5, 12])
    return [random_job(base, f"c{index}", pick, frozen, rates) for index in range(count)]


def random_memory(base: Base, jobs: list[TrainJob], pick: Pick) -> int:
    """Draw a budget between the minimum and the memory for all jobs."""
    low, high = minimum_memory(base, jobs), memory_for(base, jobs, int(sum(map(expected_entries, jobs))) + 3)
    return low + int((high - low) * pick.choice([0.0, 0.0, 1.0, pick.random(), pick.random() ** 3]))


@pytest.fixture
def single_threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one pass at a time, and discard trained adapters, which are the caller's memory."""
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    monkeypatch.setattr(cohort, "TrainedAdapter", lambda _, *rest: TrainedAdapter({}, *rest))


def check_peak(base: Base, seed: int) -> None:
    pick = random.Random(seed)
    jobs = random_jobs(base, pick)
    granted = random_memory(base, jobs, pick)
    for group in cohort.groups(jobs):  # each is trained by itself
        granted = max(granted, minimum_memory(base, [jobs[index] for index in group]))
    base.cache.pop(passes._BUFFERS, None)
    result: list[TrainedAdapter | Exception] = []
    peak = peak_bytes(lambda: result.extend(train(base, jobs, memory=granted, timesteps=2)))
    assert not any(isinstance(outcome, Exception) for outcome in result)
    assert peak <= granted, f"seed {seed}: {peak / granted:.3f} of {granted} bytes"


@pytest.mark.integration
@pytest.mark.usefixtures("single_threaded")
def test_peak_memory_is_within_the_budget(base: Base) -> None:
    for seed in range(2):
        check_peak(base, seed)


@pytest.mark.stress
@pytest.mark.usefixtures("single_threaded")
def test_peak_memory_is_within_the_budget_for_200_lists(base: Base) -> None:
    for seed in range(1000, 1200):
        check_peak(base, seed)


@pytest.mark.integration
@pytest.mark.usefixtures("single_threaded")
@pytest.mark.parametrize(
    "kind",
    sampled(
        ["low rates", "some sites", "B alone", "frozen", "one frozen", "pieces", "many examples"],
        ["low rates", "B alone", "frozen", "many examples"],
    ),
)
def test_rare_buffers_are_counted(base: Base, kind: str) -> None:
    """Concurrent steps of all jobs, masks of an adapter's own numbers, copies of frozen adapters, incomplete units."""
    frozen, large = nonzero_adapter(base, 24, 8), nonzero_adapter(base, 16, 1)
    makers: dict[str, Callable[[int], TrainJob]] = {
        "low rates": lambda place: private(base, f"{place}", 0.02, rank=16, draws=1, steps=2),
        "some sites": lambda place: private(
            base, f"{place}", 0.02, draws=1, steps=1, start=dict(list(large.items())[1:])
        ),
        "B alone": lambda place: private(base, f"{place}", 0.02, draws=1, steps=1, start=large, trains="b"),
        "frozen": lambda place: job(
            base, f"{place}", 1, batch_size=4, steps=1, frozen=nonzero_adapter(base, 40, place)
        ),
        "one frozen": lambda place: job(base, f"{place}", 1, batch_size=4, steps=1, frozen=frozen),
        "pieces": lambda place: private(base, f"{place}", 1.0, 1, rank=16, draws=3, steps=1),
        "many examples": lambda place: job(base, f"{place}", 1, 60, batch_size=1, steps=1),
    }
    jobs = [makers[kind](place) for place in range({"low rates": 15, "some sites": 10, "B alone": 10}.get(kind, 4))]
    for granted in (minimum_memory(base, jobs), memory_for(base, jobs, 16)):
        base.cache.pop(passes._BUFFERS, None)
        peak = peak_bytes(lambda granted=granted: train(base, jobs, memory=granted, timesteps=2))
        assert peak <= granted, f"{peak / granted:.3f} of {granted} bytes"


@pytest.mark.integration
@pytest.mark.usefixtures("single_threaded")
def test_early_stopping_is_within_the_budget(base: Base) -> None:
    """In addition to the validation examples themselves."""
    stopping = EarlyStopping(validation=examples(base, 12, 3), every=1, patience=9)
    jobs = [job(base, f"{index}", 16, batch_size=1, steps=1, early_stopping=stopping) for index in range(6)]
    pool = sum(tensor.numel() * 4 for tensor in stopping.validation)
    noise = 2 * stopping.validation.latents.numel() * 4  # at two timesteps
    for granted in (minimum_memory(base, jobs), memory_for(base, jobs, 12)):
        base.cache.pop(passes._BUFFERS, None)
        peak = peak_bytes(lambda granted=granted: train(base, jobs, memory=granted, timesteps=2))
        beside = capacity(base, jobs, granted).jobs * pool + noise
        assert peak <= granted + beside, f"{(peak - beside) / granted:.3f} of {granted} bytes"


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(15))
def test_rows_and_entries_use_the_budget(base: Base, seed: int) -> None:
    pick = random.Random(seed)
    jobs = random_jobs(base, pick)
    granted = random_memory(base, jobs, pick)
    shape, result = BufferSpec.of(jobs), capacity(base, jobs, granted)
    assert 1 <= result.jobs <= len(jobs)
    assert result.entries >= 1
    assert result.expected >= 1
    assert result.jobs * row_bytes(base, shape) + result.entries * entry_bytes(base, shape) <= granted
    more = capacity(base, jobs, 2 * granted)
    assert more.jobs >= result.jobs
    assert (more.entries > result.entries) or (more.jobs > result.jobs)
    plenty = capacity(base, jobs, memory_for(base, jobs, 1 + len(jobs) * (1 + int(max(map(expected_entries, jobs))))))
    assert plenty.jobs == len(jobs)
    assert plenty.entries >= sum(map(expected_entries, jobs))


def test_one_entry_always_fits(base: Base) -> None:
    """With one entry per step and client, rows could otherwise use up any budget."""
    jobs = [private(base, f"{index}", 0.02, rank=16, draws=1, batch_size=1) for index in range(12)]
    low, high = minimum_memory(base, jobs), memory_for(base, jobs, 2)
    for step in range(200):
        result = capacity(base, jobs, low + (high - low) * step // 200)
        assert result.jobs >= 1
        assert result.entries >= 1
    assert result.jobs > 4, result


def test_insufficient_memory_names_the_key(base: Base) -> None:
    jobs = [private(base, "a"), private(base, "b", rank=16)]
    result = capacity(base, jobs, minimum_memory(base, jobs))
    assert (result.jobs, result.entries) == (1, 1)
    with pytest.raises(InsufficientMemoryError, match=r"trainer\.memory_gib=.*one picture of one device requires"):
        capacity(base, jobs, minimum_memory(base, jobs) - 1)
    with pytest.raises(AntherError, match=r"trainer\.memory_gib"):
        train(base, jobs, memory=minimum_memory(base, jobs) - 1, timesteps=2)


@pytest.mark.integration
def test_oversized_job_does_not_affect_others(base: Base) -> None:
    """A job whose pictures are too large, among others."""
    small, large = job(base, "small"), job(base, "large", examples=examples(base, 2, 1, side=32))
    granted = memory_for(base, [small], 4)
    assert granted < minimum_memory(base, [large])
    result, failed = train(base, [small, large], memory=granted, timesteps=2)
    assert isinstance(failed, InsufficientMemoryError)
    assert_close(result, trained_adapter(train(base, [small], memory=PLENTY, timesteps=2)[0]), small.start)


@pytest.mark.parametrize(("prior", "draws", "rate"), [(False, 1, 0.1), (True, 3, 0.4), (False, 2, 1.0), (True, 1, 0.0)])
def test_expected_entries(base: Base, prior: bool, draws: int, rate: float) -> None:
    partners = Prior(examples=examples(base, 2, 5)) if prior else None
    plan = private(base, "a", rate, count=10, draws=draws, prior=partners, views=2, batch_size=max(1, round(10 * rate)))
    batches = BatchSampler(plan)
    mean = sum(batches.next().size for _ in range(2000)) / 2000
    assert expected_entries(plan) == pytest.approx(mean, rel=0.1)
    plain = job(base, "a", batch_size=4, prior=partners)
    assert expected_entries(plain) == BatchSampler(plain).next().size


def test_entry_bytes_grow_with_the_job(base: Base) -> None:
    """An entry takes more with a larger rank, a frozen adapter, or a larger picture; a row also with more examples."""
    plain = BufferSpec.of([job(base, "a")])
    larger = [
        BufferSpec.of([job(base, "a", rank=16)]),
        BufferSpec.of([job(base, "a", examples=examples(base, 5, 1, side=16))]),
    ]
    assert all(entry_bytes(base, shape) > entry_bytes(base, plain) for shape in larger)
    assert all(row_bytes(base, shape) > row_bytes(base, plain) for shape in larger)
    assert row_bytes(base, BufferSpec.of([job(base, "a", count=50)])) > row_bytes(base, plain)
    assert row_bytes(
        base, BufferSpec.of([job(base, "a"), job(base, "b", frozen=nonzero_adapter(base, 4, 1))])
    ) > row_bytes(base, plain)


def test_spec_covers_all_jobs(base: Base) -> None:
    one, other = nonzero_adapter(base, 2, 1), nonzero_adapter(base, 4, 2)
    stopping = EarlyStopping(validation=examples(base, 1, 0), every=1, patience=1)
    jobs = [
        job(base, "a", rank=3, count=4, frozen=one),
        job(base, "b", rank=1, count=2, frozen=one, prior=Prior(examples=examples(base, 7, 5))),
    ]
    shape = BufferSpec.of(jobs)
    assert (shape.rank, shape.frozen_rank, shape.common, shape.examples, shape.stopping) == (3, 2, True, 9, False)
    shape = BufferSpec.of([*jobs, job(base, "c", rank=1, frozen=other, early_stopping=stopping)])
    assert (shape.rank, shape.frozen_rank, shape.common, shape.examples, shape.stopping) == (3, 4, False, 9, True)
    assert BufferSpec.of([job(base, "d", start={})]).rank == 0
    assert not BufferSpec.of([*jobs, job(base, "e")]).common  # one job without a frozen adapter


@pytest.mark.integration
@pytest.mark.usefixtures("single_threaded")
@pytest.mark.parametrize("rank", [0, 1, 32])
def test_held_out_losses_are_within_the_budget(base: Base, rank: int) -> None:
    """In addition to the examples themselves. One picture at a time needs the least memory."""
    pools = [examples(base, 5, seed) for seed in range(3)]
    adapters = [stack_adapters(base.sites, [nonzero_adapter(base, rank, seed) for seed in range(3)])] if rank else []
    losses, peaks = [], []
    for granted in (0, 10**6, 4 * 10**6):
        peaks.append(
            peak_bytes(
                lambda granted=granted: losses.append(
                    held_out_losses(base, pools, adapters, timesteps=2, memory=granted)
                )
            )
        )
        beside = sum(tensor.numel() * 4 for pool in pools for tensor in pool) + 2 * pools[0].latents.numel() * 4
        assert peaks[-1] <= max(granted, peaks[0] - beside) + beside, f"{peaks[-1]} of {granted} + {beside} bytes"
        assert losses[-1] == pytest.approx(losses[0], rel=1e-5)
    assert peaks[0] < peaks[1] < peaks[2]


def test_capacity_is_independent_of_private_pictures(base: Base) -> None:
    """The minimum memory of a private job, and everything that fits, follow from the assumed number of pictures."""
    plans = [[private(base, "a", 0.5, count=count, batch_size=4)] for count in (0, 1, 7, 8)]
    assert len({minimum_memory(base, plan) for plan in plans}) == 1
    assert len({capacity(base, plan, PLENTY) for plan in plans}) == 1
    assert minimum_memory(base, [job(base, "a", count=8)]) > minimum_memory(base, [job(base, "a", count=1)])
