"""Noised gain: the reduction of a loss by an adapter, released under differential privacy.

The unit of privacy is one picture if a device noises the gains of its own pictures before it reports anything, or one
device if the trusted server noises the gains that devices reported. Both are the Gaussian mechanism (Dwork & Roth,
2014, doi:10.1561/0400000042, appendix A) on a sum of gains, each clipped to [−clip, clip]: for the accountant a
`PoissonGaussian` with a sampling rate of 1 and one step.

The sum is counted in whole steps of clip / `STEPS_PER_CLIP`, and its noise is a rounded Gaussian in the same steps
(`privacy.noise`). So the sensitivity holds exactly, and for any gains, the released gain can be any
whole number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from privacy.bounded_sum import BoundedSum, Sensitivity
from privacy.noise import NoiseSource

STEPS_PER_CLIP = 1024
"""Resolution of a gain: far finer than any noise that hides a unit."""


def clipped_sum(gains: Iterable[float], clip: float) -> BoundedSum:
    """Sum the gains, each clipped to [−clip, clip] and rounded to a whole step. NaN counts as zero.

    Formal guarantee: adding or removing one gain changes `steps` [1] by at most `STEPS_PER_CLIP`, for any other gains.

    Raises:
        ValueError: `clip` is not positive and finite.
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"clip={clip}: must be positive and finite")
    shares = (min(max(gain / clip, -1.0), 1.0) for gain in gains if not math.isnan(gain))
    steps = torch.tensor([sum(round(share * STEPS_PER_CLIP) for share in shares)])
    return BoundedSum(steps, Sensitivity(norm=clip, unit="gain"), resolution=STEPS_PER_CLIP)


def noised_mean(
    gains: Iterable[float], *, clip: float, noise_multiplier: float, count: int, noise: NoiseSource
) -> float:
    """Release (sum of clipped gains + N(0, (σ·clip)²)) / count. The noise is derived from the sum's own sensitivity.

    Without any gain the result is noise only, so that not even the number of gains is revealed.

    Args:
        gains: gain of each unit.
        clip: bound on the absolute value of a gain.
        noise_multiplier: σ.
        count: public constant that the sum is divided by; never the number of gains.
        noise: source of the noise.

    Returns:
        Noised mean gain, in units of the loss.

    Raises:
        ValueError: `clip`, `noise_multiplier` or `count` is not positive.
    """
    if not 0 < noise_multiplier < math.inf or count < 1:
        raise ValueError(f"noise_multiplier={noise_multiplier}, count={count}: each must be positive and finite")
    return float(clipped_sum(gains, clip).add_noise(noise_multiplier, noise)) / count


def noise_error(*, clip: float, noise_multiplier: float, count: int, means: int = 1) -> float:
    """Compute the standard error of the average of several noised means due to their noise.

    Args:
        clip: bound on the absolute value of a gain.
        noise_multiplier: σ.
        count: public constant that each sum is divided by.
        means: number of noised means in the average.
    """
    return noise_multiplier * clip / (count * math.sqrt(means))
