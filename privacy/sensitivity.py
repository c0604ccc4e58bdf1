"""What bounds a sum travels with the sum, and noise is derived from that alone, so that no number is typed twice.

After the bounded functions of jax-privacy: a step that clips and adds up gives a `BoundedVectorSum`, and only a `BoundedVectorSum` can be
noised. Everything in it has the weight 1: a weight that one unit could choose would be outside of every bound.

Sums are integers, whole steps of a grid that depends on public numbers alone, and so is their noise. The set of
possible releases is then the same whatever the data are (`privacy.noise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE
from privacy.noise import MAX_STDDEV_STEPS, NoiseSource

RESOLUTION = 2**20
"""Steps of the grid in the sensitivity of a sum, which both its units' parts and its noise are whole steps of.

Cutting a part towards zero takes half a step of each number on average. Of a part of norm C with D numbers that is
about 0.4 √D / 2²⁰ of its norm: 0.01 % for 10⁵ numbers, 0.1 % for 10⁷. Each number loses less than 10⁻⁶ C, where the
noise has σC. A finer grid would only make it rarer that 53 random bits decide a number (`privacy.noise.SecureNoise`).
"""

MAX_NOISE_MULTIPLIER = MAX_STDDEV_STEPS / RESOLUTION
"""The largest noise multiplier: of larger ones the integers would leave float64."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """By how much a value moves, in L2 norm, when one unit is added to the data or removed from it.

    Raises:
        ValueError: the norm is not a number over 0: no noise follows from it.
    """

    norm: float
    unit: str
    """`image` or `device`."""
    relation: str = ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise ValueError(f"sensitivity={self.norm}: must be a number over 0")

    def noise_stddev(self, noise_multiplier: float) -> float:
        """σ times the norm: the standard deviation of the noise on each number that hides one unit."""
        if not 0 < noise_multiplier <= MAX_NOISE_MULTIPLIER:
            raise ValueError(f"{noise_multiplier=}: must be a number over 0, {MAX_NOISE_MULTIPLIER:g} at most")
        return noise_multiplier * self.norm


@dataclass(frozen=True, eq=False)
class BoundedVectorSum:
    """A sum over units in whole steps of a grid, int64 [D], and what bounds each unit's part in it.

    It must not leave before it is noised.
    """

    steps: Tensor
    sensitivity: Sensitivity

    @property
    def step(self) -> float:
        """The value of one step."""
        return self.sensitivity.norm / RESOLUTION

    def add_noise(self, noise_multiplier: float, noise: NoiseSource) -> Tensor:
        """(steps + round(N(0, (σ·`RESOLUTION`)² I))) · step, float64 [D]: a release, and each call is one more.

        It is a function of the noised integers, and so as private as they are: of the sum nothing else enters it.
        """
        stddev = self.sensitivity.noise_stddev(noise_multiplier) / self.step
        noised = self.steps + noise.rounded_gaussian(len(self.steps), stddev)
        return noised.double() * self.step
