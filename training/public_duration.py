"""Public duration of a private job, in turns, independent of its Poisson batches.

In one turn, each of a device's cores runs one pass of fixed size (`training.pass_size`). The number of turns that a job
needs depends on its batches, and so on the number of pictures, which is private. So a job is given a public number of
turns that, with overwhelming probability, suffices for the number of pictures that the plan assumes. Draws beyond it
are cut off as if they had not been drawn, and unused turns are waited for (`client.rounds.train`).

*Privacy cost of the cut.* Let x be a picture, and c the coins of all others. Call c good if there are enough turns for
every outcome of the coins of x. For a good c nothing is cut, with or without x, and both releases equal those without
a schedule; the bound of the Poisson-sampled Gaussian holds for each c, since its proof conditions on the other
pictures' coins. For the other c, whose probability is at most β, nothing is claimed. Together this gives (ε, δ + β)
for the (ε, δ) of the mechanism without a cut. It would be δ + (1 + e^ε) β if whether c is good depended on the coins of
x. β is `TRUNCATION_DELTA` per step, which `privacy.accounting` subtracts from every δ. If every picture joins each batch,
nothing is ever cut.
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

_RATES = np.geomspace(1e-4, 30, 400)  # of the exponential moments: each gives a bound, and the best is used


@dataclass(frozen=True)
class TurnCount:
    """Conversion from the pictures of a step to turns.

    Raises:
        ValueError: a size is under 1.
    """

    at_once: int = 1  # passes of a turn
    units: int = 1  # pictures of a pass
    pieces: int = 1  # passes per picture, if it takes more than one

    def __post_init__(self) -> None:
        if min(self.at_once, self.units, self.pieces) < 1 or min(self.units, self.pieces) > 1:
            raise ValueError(f"{self}: a pass holds whole pictures, or a piece of one")

    @staticmethod
    def of(job: TrainJob, size: int, at_once: int) -> TurnCount:
        """Make the turns of a job with passes of `size` entries."""
        return TurnCount(at_once, max(1, size // job.unit), math.ceil(job.unit / size))

    def __call__(self, pictures: int) -> int:
        return math.ceil(math.ceil(pictures / self.units) * self.pieces / self.at_once)

    def holding(self, turns: int) -> int:
        """Return the largest number of pictures that fit in `turns`."""
        return turns * self.at_once // self.pieces * self.units


ONE_TURN_PER_PICTURE = TurnCount()
"""One turn per picture."""


@lru_cache(maxsize=1024)
def scheduled_turns(pictures: int, rate: float, steps: int, turns: TurnCount = ONE_TURN_PER_PICTURE) -> int:
    """Return a job's number of turns, sufficient for N pictures with a probability of at least 1 - steps · OVERFLOW.

    This holds for any outcome of the coins of any single picture: that picture is counted as drawn at every step. The
    bound follows from the exponential moments of the exact binomial counts of the other pictures:
    P(Σ X > k) ≤ exp(-λ (k + 1)) E[exp(λ X)]^steps for any λ > 0 (Chernoff, 1952, doi:10.1214/aoms/1177729330).

    Args:
        pictures: N, the number of pictures that the plan assumes.
        rate: q of the Poisson batches.
        turns: conversion from the pictures of a step to turns.
    """
    most = steps * turns(pictures)
    if not steps or rate >= 1:
        return most
    counts, chances = batch_size_distribution(pictures - 1, rate)
    taken = np.array([turns(int(count) + 1) for count in counts])
    budget = -math.log(steps * TRUNCATION_DELTA) + 1e-6 * steps  # the second term covers rounding
    with np.errstate(divide="ignore"):
        logs = np.log(chances)
    found = min(_enough(taken, logs, slope, steps, budget) for slope in _RATES)
    return min(most, max(steps, math.ceil(found) - 1))


def _enough(taken: np.ndarray, logs: np.ndarray, slope: float, steps: int, budget: float) -> float:
    """Bound the sum of `steps` such counts by one exponential moment."""
    exponents = slope * taken + logs
    top = float(exponents.max())
    return (steps * (top + math.log(float(np.exp(exponents - top).sum()))) + budget) / float(slope)


def scheduled_examples(plan: TrainingPlan) -> int:
    """Return the examples whose time a round of this plan takes: under DP, those that fit in its turns, one by one."""
    if plan.privacy is None:
        return plan.steps * plan.batch_size
    rate = plan.privacy.sampling_rate
    return scheduled_turns(assumed_pictures(plan.batch_size, rate), rate, plan.steps) * plan.privacy.draws
