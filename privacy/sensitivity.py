"""Sums that carry their sensitivity, from which their noise is derived.

The design follows the bounded functions of jax-privacy: clipping and summing returns a `BoundedVectorSum`, and only a
`BoundedVectorSum` can be noised, so that sum and noise can't disagree on the bound. Every unit has weight 1: no bound
would hold for a weight that a unit could choose.

Sums and their noise are integers, in steps of a grid that depends on public numbers only. So the set of possible
releases is the same for all data (`privacy.noise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE
from privacy.noise import MAX_STDDEV_STEPS, NoiseSource

RESOLUTION = 2**20
"""Number of grid steps in the sensitivity of a sum. Every unit's contribution and the noise are whole steps.

Truncation towards zero removes half a step of each number on average. For a contribution of norm C with D numbers that
is about 0.4 √D / 2²⁰ of its norm: 0.01 % for 10⁵ numbers, 0.1 % for 10⁷. Each number loses less than 10⁻⁶ C, while the
noise is σC. A finer grid would only make it rarer that 53 random bits decide a number (`privacy.noise.SecureNoise`).
"""

MAX_NOISE_MULTIPLIER = MAX_STDDEV_STEPS / RESOLUTION
"""Largest noise multiplier. With larger ones the integers would not be exact in float64."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """L2 sensitivity: the largest change of a value when one unit is added to the data or removed from it.

    Raises:
        ValueError: `norm` is not positive and finite, so that no noise follows from it.
    """

    norm: float
    unit: str
    """Unit of privacy: `image` or `device`."""
    relation: str = ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise ValueError(f"sensitivity={self.norm}: must be positive and finite")

    def noise_stddev(self, noise_multiplier: float) -> float:
        """Compute the standard deviation of the noise on each number: σ times the norm.

        Raises:
            ValueError: `noise_multiplier` is not in (0, `MAX_NOISE_MULTIPLIER`].
        """
        if not 0 < noise_multiplier <= MAX_NOISE_MULTIPLIER:
            raise ValueError(f"{noise_multiplier=}: must be over 0 and at most {MAX_NOISE_MULTIPLIER:g}")
        return noise_multiplier * self.norm


@dataclass(frozen=True, eq=False)
class BoundedVectorSum:
    """Sum of clipped contributions in whole grid steps, int64 [D], with its sensitivity.

    It is not private: only the result of `add_noise` may be shared.
    """

    steps: Tensor
    sensitivity: Sensitivity

    @property
    def step(self) -> float:
        """Value of one grid step."""
        return self.sensitivity.norm / RESOLUTION

    def add_noise(self, noise_multiplier: float, noise: NoiseSource) -> Tensor:
        """Release (steps + round(N(0, (σ·`RESOLUTION`)² I))) · step.

        The result is a function of the noised integers only, and so as private as they are (post-processing). Every
        call is another release.

        Args:
            noise_multiplier: σ.
            noise: source of the noise.

        Returns:
            Noised sum, float64 [D].
        """
        stddev = self.sensitivity.noise_stddev(noise_multiplier) / self.step
        noised = self.steps + noise.rounded_gaussian(len(self.steps), stddev)
        return noised.double() * self.step
