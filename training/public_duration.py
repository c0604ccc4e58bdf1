"""Public duration of a private job, in turns, independent of its Poisson batches.

In one turn, each of a device's cores runs one pass of fixed size (`training.pass_size`). The number of turns that a job
needs depends on its batches, and so on the number of pictures, which is private. So a job has a public number of turns
that suffices, with overwhelming probability, for the number of pictures that the plan assumes. Further draws are
dropped as if they had not been sampled, and the time of unused turns is spent waiting (`client.rounds.train`).

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
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from privacy.accounting import TRUNCATION_DELTA
from protocol.messages import TrainingPlan
from training.jobs import TrainJob, assumed_pictures
from training.pass_size import batch_size_distribution

_RATES = np.geomspace(1e-4, 30, 400)  # λ of the exponential moments: each gives a bound, and the best is used


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


def scheduled_examples(plan: TrainingPlan) -> int:
    """Return the number of examples that take as long as a round of this plan: under DP, one per turn and draw."""
    if plan.privacy is None:
        return plan.steps * plan.batch_size
    rate = plan.privacy.sampling_rate
    return scheduled_turns(assumed_pictures(plan.batch_size, rate), rate, plan.steps) * plan.privacy.draws
