"""Statistics of arms that are compared on the same people.

People are the unit of every interval: their values are averaged over seeds first, and 95 % percentile bootstraps draw
people with all their arms, so that an arm and its reference stay paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(differences: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of paired differences `[people]`."""
    low, high = np.percentile(differences[_draws(len(differences), seed)].mean(1), [2.5, 97.5])
    return float(low), float(high)


def mean(values: np.ndarray) -> Estimate:
    """Estimate the mean of values `[people]`."""
    return Estimate(float(values.mean()), *bootstrap_interval(values))


def ratio(values: np.ndarray, references: np.ndarray, *, seed: int = 0) -> Estimate:
    """Estimate the ratio of two means over the same people, which are resampled together.

    Args:
        values: values `[people]`, such as an arm's gains.
        references: values of the same people `[people]` in the denominator; the interval is meaningful if the mean of
            nearly every resample is over 0.
        seed: seed of the resamples.
    """
    if len(values) != len(references):
        raise ValueError(f"{len(values)} values, but {len(references)} references: they must be of the same people")
    draws = _draws(len(values), seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN if there is no reference
        ratios = values[draws].mean(1) / references[draws].mean(1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        return Estimate(float(values.mean() / references.mean()), float(low), float(high))


def first_reached(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Return the number of steps at which a loss curve first reaches a target, by linear interpolation.

    Args:
        steps: increasing numbers of steps.
        losses: losses after these steps.
        target: the loss to reach.

    Returns:
        The number of steps; None if the curve stays above the target.
    """
    for index, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if loss <= target:
            if index == 0:
                return float(step)
            before, higher = steps[index - 1], losses[index - 1]
            return float(before + (step - before) * (higher - target) / (higher - loss))
    return None


def _draws(people: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(people, size=(RESAMPLES, people))
