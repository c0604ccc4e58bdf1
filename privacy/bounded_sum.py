"""Sums that carry their sensitivity, from which their noise is derived.

The design follows the bounded functions of jax-privacy: clipping and summing returns a `BoundedSum`, and only a
`BoundedSum` can be noised, so that sum and noise can't disagree on the bound. Every unit has weight 1: no bound would
hold for a weight that a unit could choose. One class hides pictures in a device's sum of gradients (`privacy.dp_sgd`),
devices in the server's sum of updates (`privacy.central`), and either in a sum of gains (`privacy.noised_gain`).

Sums and their noise are integers, in steps of a grid that depends on public numbers only. So the set of possible
releases is the same for all data (`privacy.noise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
    """Unit of privacy: `image` or `device`, or `gain` for the gain of either."""
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
class Support:
    """Numbers of a sum that its contributions can change. The others are always zero and get no noise."""

    mask: Tensor
    """[D], bool."""
    count: int


@dataclass(frozen=True, eq=False)
class BoundedSum:
    """Sum of clipped contributions in whole grid steps, with its sensitivity.

    It is not private: only a sum with noise may be shared.
    """

    steps: Tensor
    """[D], whole numbers: int64, or float64 under 2⁵³."""
    sensitivity: Sensitivity
    resolution: int = RESOLUTION
    """Number of grid steps in the sensitivity."""
    support: Support | None = None
    """None: all numbers."""

    @property
    def step(self) -> float:
        """Value of one grid step."""
        return self.sensitivity.norm / self.resolution

    def stddev(self, noise_multiplier: float) -> float:
        """Return the standard deviation of the noise that hides one unit, in steps: σ times the sensitivity.

        Raises:
            ValueError: `noise_multiplier` is not positive, or so large that the integers would not be exact.
        """
        if not 0 < noise_multiplier <= MAX_STDDEV_STEPS / self.resolution:
            most = MAX_STDDEV_STEPS / self.resolution
            raise ValueError(f"{noise_multiplier=}: must be over 0 and at most {most:g}")
        return noise_multiplier * self.resolution

    def draw_noise(self, noise_multiplier: float, source: NoiseSource) -> Tensor:
        """Draw round(N(0, (σ · `resolution`)² I)) for this sum, whether or not anything was summed.

        Args:
            noise_multiplier: σ.
            source: source of the noise.

        Returns:
            Noise in whole steps, int64 [D].

        Raises:
            ValueError: the source returned anything else.
        """
        size = len(self.steps) if self.support is None else self.support.count
        noise = source.rounded_gaussian(size, self.stddev(noise_multiplier), self.steps.device)
        if noise.shape != (size,) or noise.dtype != torch.int64:
            raise ValueError(f"the noise source returned shape {tuple(noise.shape)} and {noise.dtype}")
        if self.support is None:
            return noise
        return noise.new_zeros(len(self.steps)).masked_scatter_(self.support.mask, noise)

    def add(self, noise: Tensor) -> Tensor:
        """Return (steps + noise) · step, float64 [D], for a result of `draw_noise` that is used once.

        It is a function of the noised integers only, and so as private as they are (post-processing).
        """
        return (self.steps + noise).double() * self.step

    def add_noise(self, noise_multiplier: float, source: NoiseSource) -> Tensor:
        """Release (steps + round(N(0, (σ · `resolution`)² I))) · step. Every call is another release.

        Args:
            noise_multiplier: σ.
            source: source of the noise.

        Returns:
            Noised sum, float64 [D].
        """
        return self.add(self.draw_noise(noise_multiplier, source))
