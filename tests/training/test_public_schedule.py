"""Public schedule of private jobs: pass size, and number of turns.

The size is within the budget and cheap. The turns suffice except with a charged probability, and are nearly minimal.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base.base import Base
from privacy.accounting import TRUNCATION_DELTA
from privacy.noise import CPU
from tests.helpers.reference_trainer import PLENTY, Reference, assert_close, memory_for, private
from training import capacity, cohort, passes
from training.batches import BatchSampler, StepBatch
from training.cohort import train
from training.jobs import TrainedAdapter, TrainJob
from training.public_schedule import (
    MIN_TIMED_TURNS,
    TurnCount,
    batch_size_distribution,
    fixed_pass_size,
    scheduled_turns,
)

CUDA = torch.device("cuda")
ENTRY = 6_440_459  # bytes, of the glyph base


@pytest.mark.parametrize(("assumed", "rate"), [(1, 1.0), (5, 0.6), (40, 0.1), (3000, 0.003)])
def test_batches_are_binomial(assumed: int, rate: float) -> None:
    counts, chances = batch_size_distribution(assumed, rate)
    expected = [math.comb(assumed, int(k)) * rate**k * (1 - rate) ** (assumed - k) for k in counts[:50].tolist()]
    assert chances[:50].tolist() == pytest.approx(expected, rel=1e-9)
    assert chances.sum() == pytest.approx(1, abs=1e-9)


def test_size_depends_on_the_plan_only(base: Base) -> None:
    """It is independent of the number of pictures."""
    sizes = {
        fixed_pass_size(CPU, [private(base, "a", 0.5, count=count, batch_size=4)], 64, ENTRY) for count in (0, 1, 5, 8)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("cores", [1, 2])
def test_sizes_are_whole_units_or_even_parts(base: Base, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_cores", lambda: cores)
    for draws in (1, 3, 8):
        for most in (1, 2, 5, 30):
            size = fixed_pass_size(CPU, [private(base, "a", 0.5, draws=draws, batch_size=6)], most, ENTRY)
            assert 1 <= size <= most
            assert size % draws == 0 if draws <= most else size == math.ceil(draws / math.ceil(draws / most))


def test_full_sampling_needs_no_padding(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every picture joins, the passes of a step hold exactly these."""
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    plan = private(base, "a", 1.0, draws=4, batch_size=20)
    for device, most in ((CPU, 64), (CUDA, 4096)):
        size = fixed_pass_size(device, [plan], most, ENTRY)
        assert math.ceil(80 / size) * size == 80


def test_expensive_passes_are_larger(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    plan = private(base, "a", 0.2, draws=1, batch_size=4)
    assert fixed_pass_size(CPU, [plan], 64, ENTRY) < fixed_pass_size(CUDA, [plan], 64, ENTRY) <= 20
    many = [dataclasses.replace(plan, client=str(client)) for client in range(50)]
    assert fixed_pass_size(CPU, [plan], 64, ENTRY) < fixed_pass_size(CPU, many, 64, ENTRY)


def test_large_base_has_one_picture_per_pass(base: Base) -> None:
    """Without padding, a private step costs as much as a non-private one."""
    plan = private(base, "a", 0.2, draws=1, batch_size=4)
    assert fixed_pass_size(CPU, [plan], 64, 500 * ENTRY) == 1


@pytest.mark.parametrize(("at_once", "units", "pieces"), [(1, 1, 1), (2, 3, 1), (4, 1, 1), (1, 1, 3), (2, 1, 3)])
def test_turns_and_max_pictures_agree(at_once: int, units: int, pieces: int) -> None:
    turns = TurnCount(at_once, units, pieces)
    assert turns(0) == 0
    for count in range(30):
        assert turns.max_pictures(turns(count)) >= count
        if count:
            assert turns.max_pictures(turns(count) - 1) < count


def test_pass_holds_whole_pictures_or_pieces() -> None:
    with pytest.raises(ValueError, match="a piece of one"):
        TurnCount(1, 2, 2)


def tail(assumed: int, rate: float, steps: int, turns: TurnCount, most: int) -> float:
    """Compute P(more than `most` turns) exactly: one picture is drawn at every step, the others by their coins."""
    others = [math.comb(assumed - 1, k) * rate**k * (1 - rate) ** (assumed - 1 - k) for k in range(assumed)]
    step = np.zeros(turns(assumed) + 1)
    for count, chance in enumerate(others):
        step[turns(count + 1)] += chance
    total = np.ones(1)
    for _ in range(steps):
        total = np.convolve(total, step)
    return float(total[most + 1 :].sum())


@pytest.mark.parametrize(
    ("assumed", "rate", "steps"), [(20, 0.2, 10), (5, 0.8, 3), (100, 0.04, 20), (2, 0.5, 40), (1, 0.3, 8)]
)
@pytest.mark.parametrize("turns", [TurnCount(), TurnCount(2, 3), TurnCount(2, 1, 3)])
def test_turns_suffice_except_with_charged_probability(assumed: int, rate: float, steps: int, turns: TurnCount) -> None:
    result = scheduled_turns(assumed, rate, steps, turns)
    assert tail(assumed, rate, steps, turns, result) <= steps * TRUNCATION_DELTA
    least = next(k for k in itertools.count() if tail(assumed, rate, steps, turns, k) <= steps * TRUNCATION_DELTA)
    assert result <= max(least + turns(assumed), 1.1 * least)


def test_full_sampling_is_never_truncated() -> None:
    assert scheduled_turns(20, 1.0, 7, TurnCount(1, 8)) == 7 * 3
    assert scheduled_turns(20, 0.2, 0) == 0


def test_relative_excess_falls_with_steps() -> None:
    """The excess falls with the square root of the expected number of draws, down to one draw per step."""
    shares = [scheduled_turns(20, 0.2, steps) / ((1 + 19 * 0.2) * steps) for steps in (5, 50, 500, 5000)]
    assert shares == sorted(shares, reverse=True)
    assert 1 < shares[-1] < 1.06


def idle_seconds(outcome: TrainedAdapter | Exception) -> float:
    assert isinstance(outcome, TrainedAdapter), outcome
    return outcome.idle


class _CrowdedBatches:
    """Noise source without noise, whose batches first have all pictures, then none."""

    release = False

    def __init__(self, batches: int) -> None:
        self._left = batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        self._left -= 1
        return torch.arange(size if self._left >= 0 else 0)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return torch.zeros(size, dtype=torch.int64, device=device)


def crowded_job(base: Base, batches: int, **changes: object) -> TrainJob:
    """Create a job of sixteen steps that each expect one of ten pictures."""
    return private(base, "a", 0.1, count=10, steps=16, draws=1, batch_size=1, noise=_CrowdedBatches(batches), **changes)


@pytest.mark.integration
def test_excess_units_are_dropped(fine: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of the pictures, once the turns are used up."""
    monkeypatch.setattr(capacity, "fixed_pass_size", lambda *_: 1)
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    turns = scheduled_turns(10, 0.1, 16)
    assert 10 < turns < 160
    really, kept = BatchSampler.next, list[int]()

    def cut(self: BatchSampler) -> StepBatch:
        batch = really(self)
        kept.append(min(batch.size, turns - sum(kept)))
        return batch.part(slice(kept[-1]))

    (result,) = train(fine, [crowded_job(fine, 16)], memory=PLENTY, timesteps=2)
    monkeypatch.setattr(BatchSampler, "next", cut)
    assert_close(result, Reference(fine, crowded_job(fine, 16)).train(), crowded_job(fine, 16).start, 1e-10)
    assert sum(kept) == turns
    assert 0 in kept


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the turns, with one picture each. Only they advance the clock, by one second each."""
    turns = list[int]()
    really = passes.run_passes

    def turn(*given: Any) -> Any:
        turns.append(1)
        return really(*given)

    monkeypatch.setattr(time, "perf_counter", lambda: len(turns))
    monkeypatch.setattr(cohort, "run_passes", turn)
    monkeypatch.setattr(capacity, "fixed_pass_size", lambda *_: 1)
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    return turns


@pytest.mark.integration
def test_duration_is_independent_of_the_batches(base: Base, turns: list[int]) -> None:
    planned = scheduled_turns(10, 0.1, 16)
    for batches in (0, 1, 2, 16):
        turns.clear()
        (result,) = train(base, [crowded_job(base, batches)], memory=PLENTY, timesteps=2)
        assert len(turns) + idle_seconds(result) == planned
        assert len(turns) == min(max(10 * batches, MIN_TIMED_TURNS), planned)
    several = train(base, [crowded_job(base, 1), crowded_job(base, 2)], memory=PLENTY, timesteps=2)
    assert [idle_seconds(result) for result in several] == [0, 0]


def test_turns_in_pieces_are_timed_too(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    plan = private(base, "a", 0.02, count=1, draws=4, batch_size=1, noise=_CrowdedBatches(0))
    (result,) = train(base, [plan], memory=memory_for(base, [plan], 3), timesteps=2)
    assert idle_seconds(result) > 0


@pytest.mark.parametrize("batches", [1, 16])
def test_overflow_keeps_duration_and_initial_adapter(
    base: Base, batches: int, turns: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """An error would be raised as soon as the sampled pictures are done, and a retry would draw other noise."""
    job = crowded_job(base, batches, optimizer="sgd", learning_rate=1.0, proximal=1e300)
    (result,) = train(base, [job], memory=PLENTY, timesteps=2)
    assert len(turns) + idle_seconds(result) == scheduled_turns(10, 0.1, 16)
    assert isinstance(result, TrainedAdapter)
    for name, factors in job.start.items():
        assert all(torch.equal(one, other) for one, other in zip(factors, result.adapter[name], strict=True))
    assert "became not finite" in caplog.text
