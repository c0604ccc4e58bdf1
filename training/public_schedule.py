"""Schedule of a private job, which depends on public numbers only: size of its passes, and duration in turns.

*Pass size.* The kernels of a layer, and so the last bits of a gradient, depend on the number of entries in a pass, and
an adapter can be constructed that amplifies these bits to the whole gradient. If the pass size followed the batch size,
adding one picture would change the gradients of all others, and no clip would bound that change. So all passes of
private jobs have the same size, padded with entries of weight 0. The size follows from the device, the memory budget
and the plans, which are public.

At a fixed size, an entry's result depends neither on its position in the pass nor on its neighbors
(`tests/training/test_batch_independence.py`, bit for bit).

*Duration.* In one turn, each of a device's cores runs one pass of fixed size. The number of turns that a job needs
depends on its batches, and so on the number of pictures, which is private. So a job has a public number of turns that
suffices, with overwhelming probability, for the number of pictures that the plan assumes. Further draws are dropped as
if they had not been sampled, and the time of unused turns is spent waiting (`client.rounds.train`).

*Privacy cost of the truncation.* Let x be a picture, and c the coins of all others. Call c good if there are enough
turns for every outcome of the coins of x. For a good c nothing is truncated, with or without x, and both releases equal
those without a schedule; the bound of the Poisson-sampled Gaussian holds for each c, since its proof conditions on the
other pictures' coins. For the other c, whose probability is at most β, no bound is assumed. Together this gives (ε, δ +
β) for the (ε, δ) of the mechanism without truncation. It would be δ + (1 + e^ε) β if whether c is good depended on the
coins of x. β is `TRUNCATION_DELTA` per step, which `privacy.accounting` subtracts from every δ. If every picture joins
each batch, nothing is ever truncated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
import torch

from privacy.accounting import TRUNCATION_DELTA
from protocol.messages import TrainingPlan
from training.batches import StepBatch
from training.jobs import TrainJob, assumed_pictures
from training.passes import workers

PASS_OVERHEAD_BYTES = {"cpu": 16e6, "cuda": 100e6}
"""Fixed cost of a pass (launches, Python), expressed as the bytes that take as long; from
`bench.throughput.private_cost`.
"""
MIN_TIMED_TURNS = 5
"""Turns from whose median the duration of a job is computed."""
_RATES = np.geomspace(1e-4, 30, 400)  # λ of the exponential moments: each gives a bound, and the best is used


def fixed_pass_size(device: torch.device, jobs: Sequence[TrainJob], limit: int, entry: int) -> int:
    """Choose the number of entries per pass for private jobs that are resident together and share a unit size.

    The size is the number of whole units, up to `limit`, that makes a step cheapest: few passes, little padding. A unit
    larger than `limit` is divided evenly.

    Args:
        device: the base's device.
        jobs: the resident jobs.
        limit: maximum number of entries per pass.
        entry: bytes of an entry (`training.capacity.entry_bytes`). For a large base, a pass of one picture is as cheap
            per picture as any other, and needs no padding.
    """
    unit = jobs[0].unit
    if unit > limit:
        return math.ceil(unit / math.ceil(unit / limit))
    assumed_pictures = max(1, sum(job.assumed_pictures for job in jobs))
    mean = sum(job.assumed_pictures * job.privacy.sampling_rate for job in jobs if job.privacy)
    counts, chances = batch_size_distribution(assumed_pictures, min(1.0, mean / assumed_pictures))
    overhead, parallel = PASS_OVERHEAD_BYTES[device.type] / entry, workers(device)

    def cost(units: int) -> float:
        return float(np.ceil(counts / (units * parallel)) @ chances) * (overhead + units * unit)

    return unit * min(range(1, min(limit // unit, assumed_pictures) + 1), key=cost)


def batch_size_distribution(assumed_pictures: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the distribution of the size of a Poisson batch.

    Args:
        assumed_pictures: N.
        rate: sampling rate q in [0, 1].

    Returns:
        Sizes 0 … N, int64 [N + 1], and their binomial probabilities, float64 [N + 1], which sum to 1 up to float64
        rounding. If q is 0 or 1, both are [1].
    """
    counts = np.arange(assumed_pictures + 1)
    if rate in (0, 1):
        return counts[[-int(rate)]], np.ones(1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, assumed_pictures + 1)))])  # logarithms of factorials
    with np.errstate(divide="ignore", invalid="ignore"):
        chances = (
            logs[-1] - logs - logs[::-1] + counts * math.log(rate) + (assumed_pictures - counts) * math.log1p(-rate)
        )
    return counts, np.exp(chances)


@dataclass(frozen=True)
class TurnCount:
    """Conversion from the number of pictures of a step to turns.

    Raises:
        ValueError: a size is under 1.
    """

    at_once: int = 1  # passes per turn
    units: int = 1  # pictures per pass
    pieces: int = 1  # passes per picture, if it takes more than one

    def __post_init__(self) -> None:
        if min(self.at_once, self.units, self.pieces) < 1 or min(self.units, self.pieces) > 1:
            raise ValueError(f"{self}: a pass holds whole pictures, or a piece of one")

    @staticmethod
    def of(job: TrainJob, size: int, at_once: int) -> TurnCount:
        """Return the conversion for a job.

        Args:
            job: the job.
            size: number of entries of a pass.
            at_once: number of concurrent passes.
        """
        return TurnCount(at_once, max(1, size // job.unit), math.ceil(job.unit / size))

    def __call__(self, pictures: int) -> int:
        return math.ceil(math.ceil(pictures / self.units) * self.pieces / self.at_once)

    def max_pictures(self, turns: int) -> int:
        """Return the largest number of pictures that fit in `turns`."""
        return turns * self.at_once // self.pieces * self.units


ONE_TURN_PER_PICTURE = TurnCount()
"""One turn per picture."""


@lru_cache(maxsize=1024)
def scheduled_turns(pictures: int, rate: float, steps: int, turns: TurnCount = ONE_TURN_PER_PICTURE) -> int:
    """Return a job's number of turns, sufficient for N pictures except with probability steps · `TRUNCATION_DELTA`.

    This holds for any outcome of the coins of any single picture: that picture is counted as drawn at every step. The
    bound follows from the exponential moments of the exact binomial counts of the other pictures: P(Σ X > k) ≤ exp(−λ
    (k + 1)) E[exp(λ X)]^steps for any λ > 0 (Chernoff, 1952, doi:10.1214/aoms/1177729330).

    Args:
        pictures: N, the number of pictures that the plan assumes.
        rate: q of the Poisson batches.
        steps: number of steps.
        turns: conversion from the pictures of a step to turns.
    """
    maximum = steps * turns(pictures)
    if not steps or rate >= 1:
        return maximum
    counts, chances = batch_size_distribution(pictures - 1, rate)
    turn_counts = np.array([turns(int(count) + 1) for count in counts])
    budget = -math.log(steps * TRUNCATION_DELTA) + 1e-6 * steps  # the second term covers rounding errors
    with np.errstate(divide="ignore"):
        log_probabilities = np.log(chances)
    bound = min(_moment_bound(turn_counts, log_probabilities, exponent, steps, budget) for exponent in _RATES)
    return min(maximum, max(steps, math.ceil(bound) - 1))


def _moment_bound(
    turn_counts: np.ndarray, log_probabilities: np.ndarray, exponent: float, steps: int, budget: float
) -> float:
    """Bound the sum of `steps` counts by one exponential moment."""
    exponents = exponent * turn_counts + log_probabilities
    top = float(exponents.max())
    return (steps * (top + math.log(float(np.exp(exponents - top).sum()))) + budget) / float(exponent)


class TurnBudget:
    """Public number of turns of a private job, and how many of them are left.

    Args:
        job: the job. In simulations, it may have more pictures than its plan assumes.
        turns: conversion from the pictures of a step to turns.
    """

    def __init__(self, job: TrainJob, turns: TurnCount) -> None:
        assert job.privacy
        pictures = max(job.assumed_pictures, job.pictures)
        self.planned = scheduled_turns(pictures, job.privacy.sampling_rate, job.steps, turns)
        self._turns, self._left = turns, self.planned

    def truncate(self, batch: StepBatch) -> StepBatch:
        """Truncate a Poisson batch to the remaining turns; further units count as not sampled."""
        units = min(batch.size // batch.per_unit, self._turns.max_pictures(self._left))
        self._left -= self._turns(units)
        return batch.part(slice(units * batch.per_unit))

    def remaining_seconds(self, stopwatch: Stopwatch, run_turn: Callable[[], object]) -> float:
        """Compute the remaining seconds of all planned turns from the median duration of the measured ones.

        If too few turns were measured, further turns run: the first turns take longer than later ones.

        Args:
            stopwatch: measured the job's turns.
            run_turn: runs a turn without data.
        """
        for _ in range(len(stopwatch), min(MIN_TIMED_TURNS, self.planned)):
            with stopwatch:
                run_turn()
        seconds = stopwatch.seconds()
        return max(0.0, self.planned * median(seconds) - sum(seconds)) if seconds else 0.0


def scheduled_examples(plan: TrainingPlan) -> int:
    """Return the number of examples that take as long as a round of this plan: under DP, one per turn and draw."""
    if plan.privacy is None:
        return plan.steps * plan.batch_size
    rate = plan.privacy.sampling_rate
    return scheduled_turns(assumed_pictures(plan.batch_size, rate), rate, plan.steps) * plan.privacy.draws


class Stopwatch:
    """Context manager that measures the durations of code blocks. On a GPU, only `seconds` synchronizes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._started, self._now()))

    def __len__(self) -> int:
        return len(self._spans)

    def seconds(self) -> list[float]:
        """Durations in order."""
        if not self._cuda:
            return [end - begin for begin, end in self._spans]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._spans]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
