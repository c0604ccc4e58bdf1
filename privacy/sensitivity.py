"""What bounds a sum travels with the sum, and noise is derived from that alone, so that no number is typed twice.

After the bounded functions of jax-privacy: a step that clips and adds up gives a `Bounded`, and only a `Bounded` can be
noised. Everything in it has the weight 1: a weight that one unit could choose would be outside of every bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE
from privacy.noise import NoiseSource


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

    def deviation(self, noise_multiplier: float) -> float:
        """σ times the norm: the standard deviation of the noise on each number that hides one unit."""
        if not 0 < noise_multiplier < math.inf:
            raise ValueError(f"{noise_multiplier=}: must be a number over 0")
        return noise_multiplier * self.norm


@dataclass(frozen=True, eq=False)
class Bounded:
    """A sum over units, float64 [D], and what bounds each unit's part in it. It must not leave before it is noised."""

    value: Tensor
    sensitivity: Sensitivity

    def noised(self, noise_multiplier: float, noise: NoiseSource) -> Tensor:
        """value + N(0, (σ·norm)² I), a release: each call is one more, and is to be paid for as one.

        The noise is drawn in float32, in which it will travel; see `privacy.noise.Secure` for what that leaves open.
        """
        drawn = noise.gaussian(self.value.numel()).to(self.value)
        return self.value + self.sensitivity.deviation(noise_multiplier) * drawn
