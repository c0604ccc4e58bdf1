"""What is done about devices that send what they should not.

Rules look at what a device made of the product B A, never at its factors: two devices may hold one product in factors
that have nothing in common, and an attacker may turn factors for nothing. What is malformed, not finite or of a norm
that nobody has by training doesn't come so far (`strategies.replies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Filtering(NamedTuple):
    """What a robust rule declares."""

    bounded: bool
    """Whether one device still moves the sum by its clip at most. Not with a rule that keeps or drops an update for
    what the others are: one device then decides about the others'."""
    reason: str


class Changes(NamedTuple):
    """What K devices made of the shared adapter, C_k = ΔW_k − ΔW at each site, as far as a rule needs to know it."""

    gram: Tensor
    """⟨s_i C_i, s_j C_j⟩ at each site, float64 [sites, K, K]; zero where one of them did not train it."""
    trained: Tensor
    """Who trained which site, bool [sites, K]."""
    weights: Tensor
    """Float64 [K]; 0: left out by a rule."""
    scales: Tensor
    """s_k, float64 [K], at most 1: how much of its change counts."""

    @property
    def there(self) -> Tensor:
        """Places of the devices that are not left out."""
        return self.weights.nonzero()[:, 0]

    def among(self, places: Tensor) -> Changes:
        """Those of some devices alone."""
        gram = self.gram[:, places][:, :, places]
        return Changes(gram, self.trained[:, places], self.weights[places], self.scales[places])

    def scaled(self, by: Tensor) -> Changes:
        """With so much [K] of each change."""
        return self._replace(gram=self.gram * by[:, None] * by, scales=self.scales * by)

    def norms(self) -> Tensor:
        """‖C_k‖_F [K], as `whole`."""
        return self.whole(self._squares(), self.trained).sqrt()

    def distances(self) -> Tensor:
        """‖C_i − C_j‖_F [K, K], as `whole`; NaN where two trained no site in common."""
        squares = self._squares()
        apart = squares[:, :, None] + squares[:, None] - 2 * self.gram
        return self.whole(apart, self.trained[:, :, None] & self.trained[:, None]).sqrt()

    def cosines(self) -> Tensor:
        """Of the angles between C_i and C_j [K, K], over the sites that both trained; 0 where one is zero there."""
        squares = self._squares()[:, :, None] * self.trained[:, :, None] * self.trained[:, None]
        norms = squares.clamp(min=0).sum(0).sqrt()  # of i, at the sites of j
        return (self.gram.sum(0) / (norms * norms.T)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def common(self) -> Tensor:
        """Whether two trained a site in common, bool [K, K]."""
        trained = self.trained.double()
        return trained.T @ trained > 0

    def whole(self, squares: Tensor, known: Tensor) -> Tensor:
        """Sums over the sites where they are known, in proportion to all of them.

        A site counts by the median of the changes there: of a device that trained half of them it is told what all
        would have come to, so that it can be held against the others. NaN where nothing is known.

        Args:
            squares: [sites, …].
            known: of the same shape.
        """
        typical = self._typical().view(-1, *[1] * (known.dim() - 1))
        return (squares.clamp(min=0) * known).sum(0) * typical.sum() / (typical * known).sum(0)

    def _squares(self) -> Tensor:
        """‖C_k‖² at each site, [sites, K]."""
        return self.gram.diagonal(dim1=1, dim2=2)

    def _typical(self) -> Tensor:
        """The median of ‖C_k‖² at each site over those who trained it, [sites]; all alike if nothing has changed."""
        known = self._squares().masked_fill(~self.trained, float("nan")).nanmedian(dim=1).values.nan_to_num()
        return known if known.any() else self.trained.any(dim=1).to(known)


class Rule(Protocol):
    """Judges changes: by what is left of each one's weight, and of its change."""

    sensitivity: Filtering

    def judge(self, changes: Changes) -> Changes:
        """The same devices with other weights and scales; at least one is there, and at least one stays."""
        ...


class Entrywise(Protocol):
    """Makes one change of all, entry by entry."""

    sensitivity: Filtering

    def combine(self, changes: Tensor) -> Tensor:
        """One value for each entry, of those of all devices, [K, …] → […]; K ≥ 1, in place where that saves room."""
        ...


Rules = Sequence[Rule]
