"""A failing job affects no other job, its row is reused, and it leaves no state behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib.tiny import ATTENTION
from models.base.base import Base
from models.lora.adapter import Factors
from privacy.noise import CPU, SimulatedNoise
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    assert_same_bits,
    examples,
    job,
    memory_for,
    minimum_memory,
    nonzero_adapter,
    private,
    trained_adapter,
)
from training.capacity import capacity, expected_entries
from training.cohort import train
from training.jobs import Cancelled, EarlyStopping, Examples, Prior, TrainedAdapter, TrainJob

Make = Callable[[Base], TrainJob]


class _FailingNoise(SimulatedNoise):
    """Noise source that raises at the `after`-th call of one of its methods."""

    def __init__(self, method: str, after: int) -> None:
        super().__init__(seed=0, client="broken", round=1, purpose="shared")
        self._method, self._left = method, after

    def _called(self, method: str) -> None:
        self._left -= method == self._method
        if self._left < 0:
            raise OSError("no entropy")

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        self._called("poisson_batch")
        return super().poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        self._called("rounded_gaussian")
        return super().rounded_gaussian(size, stddev, device)


def after(calls: int) -> Callable[[], bool]:
    """Return a callback that becomes true after some calls."""
    left = [calls]

    def asked() -> bool:
        left[0] -= 1
        return left[0] < 0

    return asked


def with_latents(plan: TrainJob, change: Callable[[Tensor], Tensor]) -> TrainJob:
    return dataclasses.replace(plan, examples=Examples(change(plan.examples.latents), plan.examples.context))


def one_nan(latents: Tensor) -> Tensor:
    latents = latents.clone()
    latents[2, 0, 0, 0] = math.nan
    return latents


def other_context(base: Base) -> Prior:
    latents, context = examples(base, 2, 5)
    return Prior(examples=Examples(latents, context[:, :3]))


FAULTS: dict[str, tuple[Make, type[Exception], str]] = {
    "NaN data": (lambda base: with_latents(job(base, "bad"), lambda x: x * math.nan), Exception, "not finite"),
    "one NaN": (lambda base: with_latents(job(base, "bad"), one_nan), Exception, "not finite"),
    "infinite data": (lambda base: with_latents(job(base, "bad"), lambda x: x / 0.0), Exception, "not finite"),
    "infinite rate": (lambda base: job(base, "bad", learning_rate=math.inf), Exception, "learning_rate"),
    "NaN at the start": (
        lambda base: job(
            base, "bad", start={n: Factors(f.a * math.nan, f.b) for n, f in nonzero_adapter(base, 2, 1).items()}
        ),
        Exception,
        "not finite",
    ),
    "NaN at the start, private": (
        lambda base: private(
            base, "bad", start={n: Factors(f.a * math.nan, f.b) for n, f in nonzero_adapter(base, 2, 1).items()}
        ),
        Exception,
        "not finite",
    ),
    "no first batch": (
        lambda base: private(base, "bad", noise=_FailingNoise("poisson_batch", 0)),
        OSError,
        "no entropy",
    ),
    "no third batch": (
        lambda base: private(base, "bad", noise=_FailingNoise("poisson_batch", 2)),
        OSError,
        "no entropy",
    ),
    "no first noise": (
        lambda base: private(base, "bad", noise=_FailingNoise("rounded_gaussian", 0)),
        OSError,
        "no entropy",
    ),
    "no second noise": (
        lambda base: private(base, "bad", noise=_FailingNoise("rounded_gaussian", 1)),
        OSError,
        "no entropy",
    ),
    "empty batch without noise": (
        lambda base: private(base, "bad", rate=0.0, noise=_FailingNoise("rounded_gaussian", 2)),
        OSError,
        "no entropy",
    ),
    "fewer contexts": (
        lambda base: job(base, "bad", examples=Examples(examples(base, 5, 1).latents, examples(base, 3, 1).context)),
        ValueError,
        "context",
    ),
    "an unknown site": (
        lambda base: job(base, "bad", start={"nowhere": Factors(torch.ones(2, 3), torch.ones(3, 2))}),
        ValueError,
        "nowhere",
    ),
    "factors that don't match": (
        lambda base: job(
            base, "bad", start={n: Factors(f.a, f.b[:, :1]) for n, f in nonzero_adapter(base, 2, 1).items()}
        ),
        ValueError,
        "fit",
    ),
    "frozen for another base": (
        lambda base: job(
            base, "bad", frozen={n: Factors(f.a[:, 1:], f.b) for n, f in nonzero_adapter(base, 2, 1).items()}
        ),
        ValueError,
        "fit",
    ),
    "no validation examples": (
        lambda base: job(
            base, "bad", early_stopping=EarlyStopping(validation=examples(base, 0, 1), every=1, patience=1)
        ),
        ValueError,
        "validation",
    ),
    "no pictures": (lambda base: job(base, "bad", count=0), ValueError, "no pictures"),
    "prior of another size": (
        lambda base: job(base, "bad", prior=Prior(examples=examples(base, 2, 5, side=4))),
        ValueError,
        "shape",
    ),
    "prior of another length": (lambda base: job(base, "bad", prior=other_context(base)), ValueError, "shape"),
    "negative clip": (lambda base: private(base, "bad", clip=-1.0), ValueError, "clip"),
    "no clip": (lambda base: private(base, "bad", clip=math.inf), ValueError, "unbounded"),
    "cancelled at once": (lambda base: job(base, "bad", cancelled=lambda: True), Cancelled, "after step"),
    "callback raises": (lambda base: job(base, "bad", cancelled=lambda: 1 // 0 > 0), ZeroDivisionError, "zero"),
    "cancelled within a step": (lambda base: private(base, "bad", cancelled=after(2)), Cancelled, "after step"),
}


def valid_jobs(base: Base) -> list[TrainJob]:
    frozen = nonzero_adapter(base, 2, 9)
    return [job(base, "plain", rank=3, steps=2), private(base, "private"), job(base, "last", frozen=frozen, steps=3)]


@pytest.fixture(scope="module")
def reference_results(fine: Base) -> list[TrainedAdapter | Exception]:
    return train(fine, valid_jobs(fine), memory=PLENTY, timesteps=2)


@pytest.mark.integration
@pytest.mark.parametrize("first", range(0, len(FAULTS), 4))
def test_faults_do_not_affect_others(
    fine: Base, reference_results: list[TrainedAdapter | Exception], first: int
) -> None:
    """Jobs in the same passes agree to ten digits with a run without the four faults."""
    faults, jobs = list(FAULTS.values())[first : first + 4], valid_jobs(fine)
    jobs[1:1] = [make(fine) for make, _, _ in faults]
    result = train(fine, jobs, memory=memory_for(fine, jobs, 7), timesteps=2)
    for _, kind, message in faults:
        failed = result.pop(1)
        assert isinstance(failed, kind), failed
        assert message in str(failed)
    for got, expected, plan in zip(result, reference_results, valid_jobs(fine), strict=True):
        assert_close(got, trained_adapter(expected), plan.start, 1e-10)


@pytest.mark.parametrize(
    "cut",
    [lambda x, c: (x[:, :3], c), lambda x, c: (x, c[..., :15])],
    ids=["channels", "width of the context"],
)
def test_incompatible_examples_fail_their_own_job(
    fine: Base,
    reference_results: list[TrainedAdapter | Exception],
    cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    bad = job(fine, "bad", examples=Examples(*cut(*examples(fine, 5, 1))))
    failed, *result = train(fine, [bad, *valid_jobs(fine)], memory=PLENTY, timesteps=2)
    assert isinstance(failed, Exception)
    for got, expected, plan in zip(result, reference_results, valid_jobs(fine), strict=True):
        assert_close(got, trained_adapter(expected), plan.start, 1e-10)


@pytest.mark.integration
def test_rows_are_reused_after_faults(fine: Base) -> None:
    """Nine jobs in memory for two: failing ones leave at any time, and the others finish."""
    kinds: list[Make] = [
        lambda base: private(base, "a", count=3, steps=2),
        FAULTS["no first batch"][0],
        lambda base: job(base, "b", batch_size=2, steps=3),
        FAULTS["fewer contexts"][0],
        FAULTS["no second noise"][0],
        lambda base: job(base, "c", rank=3, steps=1),
        FAULTS["cancelled within a step"][0],
        lambda base: private(base, "d", rate=0.0, steps=2),
        lambda base: job(base, "e", steps=0),
    ]
    jobs = [make(fine) for make in kinds]
    memory = memory_for(fine, jobs, 1 + int(2 * max(map(expected_entries, jobs))), residents=2)
    assert capacity(fine, jobs, memory).jobs == 2
    result = train(fine, jobs, memory=memory, timesteps=2)
    assert [isinstance(outcome, Exception) for outcome in result] == [index in (1, 3, 4, 6) for index in range(9)]
    assert isinstance(result[6], Cancelled)
    for index in (0, 2, 5, 7, 8):
        plan = kinds[index](fine)
        assert_close(result[index], Reference(fine, plan).train(), plan.start, 1e-10)


@pytest.mark.integration
@pytest.mark.parametrize("passes", [1, 2, 5, 7])
def test_job_may_fail_within_a_unit(fine: Base, passes: int) -> None:
    """Its row goes to the next job, which gets none of its queued entries and pieces."""

    def following() -> list[TrainJob]:
        return [private(fine, "next", draws=4, steps=2, rate=1.0, count=2), job(fine, "last", steps=1)]

    gone = private(fine, "gone", draws=4, rate=1.0, cancelled=after(passes - 1))
    jobs = [gone, *following()]
    memory = minimum_memory(fine, jobs)
    assert capacity(fine, jobs, memory)[:2] == (1, 1)  # one draw per pass
    cancelled, *result = train(fine, jobs, memory=memory, timesteps=2)
    assert isinstance(cancelled, Cancelled)
    for got, plan in zip(result, following(), strict=True):
        assert_close(got, Reference(fine, plan).train(), plan.start, 1e-10)


def test_cancellation_is_checked_between_passes(base: Base) -> None:
    """A cancelled job of a thousand steps ends early and reports its progress."""
    asked: list[int] = []

    def gone() -> bool:
        asked.append(1)
        return len(asked) > 3

    (result,) = train(base, [job(base, "a", steps=1000, cancelled=gone)], memory=PLENTY, timesteps=2)
    assert isinstance(result, Cancelled)
    assert len(asked) == 4
    assert "step 3" in str(result)


@pytest.mark.integration
@pytest.mark.parametrize("entries", [2, 40])
def test_non_finite_private_picture_counts_as_zero(fine: Base, entries: int) -> None:
    """The job doesn't fail: an error would reveal the picture."""

    def plan() -> TrainJob:
        return with_latents(private(fine, "a", rate=1.0), one_nan)

    memory = memory_for(fine, [plan()], entries)
    (result,) = train(fine, [plan()], memory=memory, timesteps=2)
    assert_close(result, Reference(fine, plan()).train(), plan().start, 1e-10)
    everything = with_latents(private(fine, "a"), lambda x: x * math.nan)
    nobody = private(fine, "a", rate=0.0)
    result, noise_alone = train(fine, [everything, nobody], memory=memory, timesteps=2)
    assert_close(result, trained_adapter(noise_alone), plan().start, 1e-10)


@pytest.mark.integration
def test_faults_leave_no_state(base: Base, pipeline_folder: Path) -> None:
    """Buffers are kept between calls, also after faults: results equal those on a new base."""
    unseen = Base(pipeline_folder, sites=ATTENTION)
    expected = train(unseen, valid_jobs(unseen), memory=PLENTY, timesteps=2)
    for faults in (["NaN data", "no second noise", "cancelled within a step"], ["NaN at the start, private"] * 3):
        dirty = [FAULTS[fault][0](base) for fault in faults]
        bad = train(
            base,
            [dataclasses.replace(plan, frozen=nonzero_adapter(base, 2, 7)) for plan in dirty],
            memory=PLENTY,
            timesteps=2,
        )
        assert all(isinstance(outcome, Exception) for outcome in bad)
        for got, want in zip(train(base, valid_jobs(base), memory=PLENTY, timesteps=2), expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.integration
def test_buffers_are_reused_for_similar_jobs(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not allocated in every round; jobs of another shape in between change no bit."""
    from training import buffers, passes

    created: list[buffers.CohortBuffers] = []

    def counting(*args: Any) -> buffers.CohortBuffers:
        created.append(buffers.CohortBuffers(*args))
        return created[-1]

    monkeypatch.setattr(passes, "CohortBuffers", counting)

    def jobs() -> list[TrainJob]:
        return [plan for plan in valid_jobs(base) if plan.privacy]

    memory = memory_for(base, jobs(), 40)
    one = train(base, jobs(), memory=memory, timesteps=2)
    before = len(created)
    two = train(base, jobs(), memory=memory, timesteps=2)
    assert len(created) == before
    train(base, [job(base, "other", rank=5, frozen=nonzero_adapter(base, 3, 2))], memory=memory, timesteps=2)
    assert len(created) == before + 1
    three = train(base, jobs(), memory=memory, timesteps=2)
    for first, second, third in zip(one, two, three, strict=True):
        assert_same_bits(first, second)
        assert_same_bits(first, third)
