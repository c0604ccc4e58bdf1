"""A noised gain: by how much an adapter lowers a loss, with no one unit's part to be seen in it.

A unit is one picture, where a device noises the gains of its own before it tells anything, or one device, where the
trusted server noises what the devices told it. Either is the Gaussian mechanism (Dwork & Roth, 2014,
doi:10.1561/0400000042, appendix A) on a sum of gains, each clipped to [−clip, clip]: to the accountant a
`PoissonGaussian` with a sampling rate of 1 and one step.

The sum is counted in whole steps of clip / STEPS, and its noise is a rounded Gaussian in the same steps
(`privacy.noise`): the sensitivity holds exactly, and a gain is released as a whole number of steps, any of which is
possible whatever the gains were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from privacy.accounting import ADD_OR_REMOVE_ONE
from privacy.noise import NoiseSource

STEPS_PER_CLIP = 1024
"""Of a clip: far finer than any noise that hides a unit."""


class BoundedGainSum(NamedTuple):
    """A sum of clipped gains in whole steps, with what bounds it."""

    steps: int
    sensitivity: int
    """By how many steps, at most, one gain more or less changes the sum."""
    step: float
    """What one step is worth, in units of the loss."""
    relation: str = ADD_OR_REMOVE_ONE


def clipped_sum(gains: Iterable[float], clip: float) -> BoundedGainSum:
    """The sum of the gains, each clipped to [−clip, clip] and rounded to a step; one that is no number counts as zero.

    Formal guarantee: adding or removing one gain changes `steps` by at most `sensitivity`, whatever the others are.

    Raises:
        ValueError: `clip` is not a number over 0.
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"clip={clip}: must be a number over 0")
    shares = (min(max(gain / clip, -1.0), 1.0) for gain in gains if not math.isnan(gain))
    return BoundedGainSum(sum(round(share * STEPS_PER_CLIP) for share in shares), STEPS_PER_CLIP, clip / STEPS_PER_CLIP)


def noised_mean(
    gains: Iterable[float], *, clip: float, noise_multiplier: float, count: int, noise: NoiseSource
) -> float:
    """(sum of clipped gains + N(0, (σ·clip)²)) / count, where the noise follows from the sum's own sensitivity.

    No gains at all give noise alone, so that not even their number is told.

    Args:
        count: the public constant that the sum is divided by, never the number of gains.

    Raises:
        ValueError: `clip`, `noise_multiplier` or `count` is not over 0.
    """
    if not 0 < noise_multiplier < math.inf or count < 1:
        raise ValueError(f"noise_multiplier={noise_multiplier}, count={count}: each must be a number over 0")
    bounded = clipped_sum(gains, clip)
    drawn = int(noise.rounded_gaussian(1, noise_multiplier * bounded.sensitivity))
    return (bounded.steps + drawn) * bounded.step / count


def noise_error(*, clip: float, noise_multiplier: float, count: int, means: int = 1) -> float:
    """Standard error that the noise alone gives to the mean of so many noised means."""
    return noise_multiplier * clip / (count * math.sqrt(means))
