"""What is done about devices that send what they should not.

Rules look at what a device made of the product B A, never at its factors: two devices may hold one product in factors
that have nothing in common, and an attacker may turn factors for nothing. What is malformed, not finite or of a norm
that nobody has by training doesn't come so far (`strategies.round.validation`).
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


class UpdateGeometry(NamedTuple):
    """What K devices made of the shared adapter, C_k = ΔW_k − ΔW at each site, as far as a rule needs to know it.

    Sites that the same devices trained are a group: of each K² numbers are held, one group where everybody trains
    everything, as many as sites at most; and of each site K. 8 MB a group of 1,000 devices.
    """

    gram: Tensor
    """⟨s_i C_i, s_j C_j⟩ over the sites of each group, float64 [groups, K, K]; zero where one did not train them."""
    squares: Tensor
    """‖s_k C_k‖² at each site, float64 [sites, K]."""
    groups: Tensor
    """Of each site, long [sites]."""
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

    def among(self, places: Tensor) -> UpdateGeometry:
        """Those of some devices alone."""
        return UpdateGeometry(
            self.gram[:, places][:, :, places],
            self.squares[:, places],
            self.groups,
            self.trained[:, places],
            self.weights[places],
            self.scales[places],
        )

    def scaled(self, by: Tensor) -> UpdateGeometry:
        """With so much [K] of each change."""
        return self._replace(
            gram=self.gram * by[:, None] * by, squares=self.squares * by.square(), scales=self.scales * by
        )

    def norms(self) -> Tensor:
        """‖C_k‖_F [K], as `whole`."""
        return self.whole(self.squares.clamp(min=0).sum(0)).sqrt()

    def distances(self) -> Tensor:
        """‖C_i − C_j‖_F [K, K], over the sites that both trained, in proportion to all as `whole` has it; NaN where
        they trained none in common."""
        mine, trained, typical = self._mine(), self.trained.double(), self._typical()
        squares = (mine + mine.T - 2 * self.gram.sum(0)).clamp(min=0)
        return (squares * typical.sum() / ((typical[:, None] * trained).T @ trained)).sqrt()

    def cosines(self) -> Tensor:
        """Of the angles between C_i and C_j [K, K], over the sites that both trained; 0 where one is zero there."""
        norms = self._mine().clamp(min=0).sqrt()
        return (self.gram.sum(0) / (norms * norms.T)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def common(self) -> Tensor:
        """Whether two trained a site in common, bool [K, K]."""
        trained = self.trained.double()
        return trained.T @ trained > 0

    def group_squares(self) -> tuple[Tensor, Tensor]:
        """Who trained the sites of each group, bool, and ‖C_k‖² over them, both [groups, K]."""
        count = len(self.gram)
        trained = self.trained.new_zeros(count, self.trained.shape[1]).index_copy(0, self.groups, self.trained)
        return trained, self.squares.new_zeros(trained.shape).index_add(0, self.groups, self.squares)

    def whole(self, squares: Tensor) -> Tensor:
        """Sums over the sites that each trained [K], in proportion to all of them.

        A site counts by the median of the changes there: of a device that trained half of them it is told what all
        would have come to, so that it can be held against the others. NaN of who trained nothing.
        """
        typical = self._typical()
        return squares * typical.sum() / (typical[:, None] * self.trained).sum(0)

    def _mine(self) -> Tensor:
        """‖C_i‖² over the sites that j trained, [K, K]."""
        return self.squares.T @ self.trained.double()

    def _typical(self) -> Tensor:
        """The median of ‖C_k‖² at each site over those who trained it, [sites]; all alike if nothing has changed."""
        known = self.squares.masked_fill(~self.trained, float("nan")).nanmedian(dim=1).values.nan_to_num()
        return known if known.any() else self.trained.any(dim=1).to(known)


class RobustRule(Protocol):
    """Judges changes: by what is left of each one's weight, and of its change."""

    sensitivity: Filtering

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        """The same devices with other weights and scales; at least one is there, and at least one stays."""
        ...


class EntrywiseRule(Protocol):
    """Makes one change of all, entry by entry."""

    sensitivity: Filtering

    def combine(self, changes: Tensor) -> Tensor:
        """One value for each entry, of those of all devices, [K, …] → […]; K ≥ 1, in place where that saves room."""
        ...


RobustRules = Sequence[RobustRule]
