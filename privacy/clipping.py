"""Per-example clipping whose result carries its own guarantee.

Abadi et al. (2016, arXiv:1607.00133), algorithm 1: g ← g · min(1, C / ‖g‖₂). A sum that carries its sensitivity,
from which the noise is derived, can't be noised for another bound than its own:

    total = clip_rows(rows, clip).sum()        # over the micro-batches of one logical batch: total + clip_rows(…).sum()
    deviation = gaussian_sigma(total, noise_multiplier)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE


@dataclass(frozen=True)
class BoundedSum:
    """A sum of clipped rows, one for each example.

    Formal guarantee: adding or removing one example changes `values` by at most `l2_bound` in the L2 norm (up to
    float32 rounding, 1 part in 10⁶), whatever the other examples are.
    """

    values: Tensor  # [D]
    l2_bound: float
    relation: str = ADD_OR_REMOVE_ONE

    def __add__(self, other: BoundedSum) -> BoundedSum:
        """The sum over both sets of examples, which must be disjoint, e.g. two micro-batches of one Poisson batch.

        Raises:
            ValueError: the two have different bounds.
        """
        if (self.l2_bound, self.relation) != (other.l2_bound, other.relation):
            raise ValueError(f"can't add sums bounded by {self.l2_bound} and {other.l2_bound}: clip both to one bound")
        return BoundedSum(self.values + other.values, self.l2_bound, self.relation)


@dataclass(frozen=True)
class ClippedRows:
    """One row for each example. Formal guarantee: every row is finite and has an L2 norm of at most `l2_bound`."""

    values: Tensor  # [N, D]
    l2_bound: float

    def sum(self) -> BoundedSum:
        """The sum over examples [D]; zeros for an empty Poisson batch."""
        return BoundedSum(self.values.sum(0), self.l2_bound)


def clip_rows(gradients: Tensor, clip: float) -> ClippedRows:
    """Scale each row of [N, D] to an L2 norm of at most `clip` (C); a row that is not finite becomes zero.

    A NaN survives min(1, C / NaN) and would carry an unbounded row past the clip, hence the zero. Norms are
    taken in float64, where no float32 row overflows or vanishes. C = 0 gives zeros, C = ∞ changes no finite row.

    Raises:
        ValueError: `clip` is negative or NaN.
    """
    if not clip >= 0:
        raise ValueError(f"clip={clip}: must be 0 or more")
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    scales = (clip / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    scaled = (gradients * scales[:, None]).float()
    return ClippedRows(scaled.masked_fill(~norms.isfinite()[:, None], 0.0), clip)


def gaussian_sigma(bounded: BoundedSum, noise_multiplier: float) -> float:
    """Standard deviation of the noise that hides one example: σ times the sensitivity of what is noised.

    Raises:
        ValueError: no noise hides an unbounded sum.
    """
    if math.isinf(bounded.l2_bound) and noise_multiplier > 0:
        raise ValueError("an unbounded sum can't be noised: clip it to a finite norm")
    return noise_multiplier * bounded.l2_bound if noise_multiplier else 0.0
