"""How long a private job takes, whatever its Poisson batches hold: a public number of turns.

A turn is what a device's cores do at once, a pass of one size (`training.fixed`) each. How many a job needs follows
from its batches, and so from how many pictures there are. So it is given a number that is enough, all but surely, for
as many as the plan assumes. What would go beyond is cut off as if it had not been drawn, and turns that weren't needed
are waited for (`client.train`).

*What the cut costs.* Let x be a picture, and c the coins of all others. Say that c is good if there are enough turns
whatever the coins of x are. For a good c nothing is cut, with x or without it, and both releases are what they are
without a schedule; the bound of the Poisson-sampled Gaussian holds for each c, since its proof conditions on the other
pictures' coins. For the other c, whose probability is β at most, nothing is claimed. Together that is (ε, δ + β) for
the (ε, δ) of the mechanism without a cut. It would be δ + (1 + e^ε) β if the coins of x had a say in what is good. β is
`OVERFLOW` a step, which `privacy.accounting` takes off every δ. Where everybody joins each batch nothing is ever cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from privacy.accounting import OVERFLOW
from protocol.messages import TrainingPlan
from training.fixed import pictures_of_a_step
from training.jobs import Train, assumed

_RATES = np.geomspace(1e-4, 30, 400)  # of the exponential moments: each gives a bound, the best of them is taken


@dataclass(frozen=True)
class Turns:
    """Turns that the pictures of a step take.

    Raises:
        ValueError: a size under 1.
    """

    at_once: int = 1  # passes of a turn
    units: int = 1  # pictures of a pass
    pieces: int = 1  # passes of a picture that takes more than one

    def __post_init__(self) -> None:
        if min(self.at_once, self.units, self.pieces) < 1 or min(self.units, self.pieces) > 1:
            raise ValueError(f"{self}: a pass holds whole pictures, or a piece of one")

    @staticmethod
    def of(job: Train, size: int, at_once: int) -> Turns:
        """Those of a job in passes of `size` entries."""
        return Turns(at_once, max(1, size // job.unit), math.ceil(job.unit / size))

    def __call__(self, pictures: int) -> int:
        return math.ceil(math.ceil(pictures / self.units) * self.pieces / self.at_once)

    def holding(self, turns: int) -> int:
        """The most pictures that so many turns are enough for."""
        return turns * self.at_once // self.pieces * self.units


EACH = Turns()
"""A turn for each picture."""


@lru_cache(maxsize=1024)
def scheduled(pictures: int, rate: float, steps: int, turns: Turns = EACH) -> int:
    """Turns of a job, which are enough for N pictures with a probability of at least 1 - steps · OVERFLOW.

    Whatever the coins of any one of them are: it is counted as drawn at every step. By the exponential moments of the
    others' exact binomial counts: P(Σ X > k) ≤ exp(-λ (k + 1)) E[exp(λ X)]^steps for any λ > 0 (Chernoff, 1952,
    doi:10.1214/aoms/1177729330).

    Args:
        pictures: N, those that the plan assumes.
        rate: q of the Poisson batches.
        turns: of the pictures of a step.
    """
    most = steps * turns(pictures)
    if not steps or rate >= 1:
        return most
    counts, chances = pictures_of_a_step(pictures - 1, rate)
    taken = np.array([turns(int(count) + 1) for count in counts])
    budget = -math.log(steps * OVERFLOW) + 1e-6 * steps  # the rest for rounding
    with np.errstate(divide="ignore"):
        logs = np.log(chances)
    found = min(_enough(taken, logs, slope, steps, budget) for slope in _RATES)
    return min(most, max(steps, math.ceil(found) - 1))


def _enough(taken: np.ndarray, logs: np.ndarray, slope: float, steps: int, budget: float) -> float:
    """What the sum of `steps` such counts stays under, by one exponential moment."""
    exponents = slope * taken + logs
    top = float(exponents.max())
    return (steps * (top + math.log(float(np.exp(exponents - top).sum()))) + budget) / float(slope)


def scheduled_examples(plan: TrainingPlan) -> int:
    """Examples whose time a round of this plan takes: under DP those that its turns are enough for, one by one."""
    if plan.privacy is None:
        return plan.steps * plan.batch_size
    rate = plan.privacy.sampling_rate
    return scheduled(assumed(plan.batch_size, rate), rate, plan.steps) * plan.privacy.draws
