"""Robust rules: reduce or remove the influence of malicious updates before aggregation.

Rules look at the change of the product B A, never at the factors: two devices may send the same product in unrelated
factors, and an attacker can rotate factors at no cost. Malformed, non-finite and oversized updates are rejected earlier
(`strategies.round.validation`).

Each module registers its rule as `@robust_rule("name")`. A rule has one of three methods: `check` decides on each reply
as it arrives, `reweight` on all updates of a round, and `combine` merges all updates into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from common.plugins import Registry

ROBUST_RULES: Registry[Any] = Registry("robust", key="robust", modules=__name__)
robust_rule = ROBUST_RULES.register


class Filtering(NamedTuple):
    """Sensitivity declaration of a robust rule."""

    bounded: bool
    """Whether one device still changes the sum by at most its clip. False for a rule that keeps or drops an update
    depending on the others: one device then affects the weights of the others."""
    reason: str


class UpdateGeometry(NamedTuple):
    """Norms and inner products of the changes C_k = ΔW_k − ΔW of K devices, with the weights that rules assign.

    Sites that the same devices trained form a group. Memory is K² numbers per group (one group if every device trains
    every site, at most one per site) and K per site: 8 MB per group for 1,000 devices.
    """

    gram: Tensor
    """⟨s_i C_i, s_j C_j⟩ over the sites of each group, float64 `[groups, K, K]`; zero for untrained sites."""
    squares: Tensor
    """‖s_k C_k‖² at each site, float64 `[sites, K]`."""
    groups: Tensor
    """Group of each site, long `[sites]`."""
    trained: Tensor
    """Whether a device trained a site, bool `[sites, K]`."""
    weights: Tensor
    """Float64 `[K]`; 0 for a device that a rule removed."""
    scales: Tensor
    """s_k, the factor of each device's change, float64 `[K]`, at most 1."""

    @property
    def active(self) -> Tensor:
        """Indices of the devices with nonzero weight."""
        return self.weights.nonzero()[:, 0]

    def subset(self, devices: Tensor) -> UpdateGeometry:
        """Restrict to the devices with these indices."""
        return UpdateGeometry(
            self.gram[:, devices][:, :, devices],
            self.squares[:, devices],
            self.groups,
            self.trained[:, devices],
            self.weights[devices],
            self.scales[devices],
        )

    def scaled(self, by: Tensor) -> UpdateGeometry:
        """Scale each change by a factor `[K]`."""
        return self._replace(
            gram=self.gram * by[:, None] * by, squares=self.squares * by.square(), scales=self.scales * by
        )

    def norms(self) -> Tensor:
        """Compute ‖C_k‖_F `[K]`, extrapolated to all sites (see `extrapolate`)."""
        return self.extrapolate(self.squares.clamp(min=0).sum(0)).sqrt()

    def distances(self) -> Tensor:
        """Compute ‖C_i − C_j‖_F `[K, K]` over the sites that both trained, extrapolated to all sites.

        NaN for two devices without a common site.
        """
        common, trained, typical = self._common_squares(), self.trained.double(), self._typical()
        squares = (common + common.T - 2 * self.gram.sum(0)).clamp(min=0)
        return (squares * typical.sum() / ((typical[:, None] * trained).T @ trained)).sqrt()

    def cosines(self) -> Tensor:
        """Compute the cosines between C_i and C_j `[K, K]` over the sites that both trained; 0 if one is zero there."""
        norms = self._common_squares().clamp(min=0).sqrt()
        return (self.gram.sum(0) / (norms * norms.T)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def common(self) -> Tensor:
        """Whether two devices trained a common site, bool `[K, K]`."""
        trained = self.trained.double()
        return trained.T @ trained > 0

    def group_squares(self) -> tuple[Tensor, Tensor]:
        """Return which devices trained the sites of each group, bool, and ‖C_k‖² over them, both `[groups, K]`."""
        count = len(self.gram)
        trained = self.trained.new_zeros(count, self.trained.shape[1]).index_copy(0, self.groups, self.trained)
        return trained, self.squares.new_zeros(trained.shape).index_add(0, self.groups, self.squares)

    def extrapolate(self, squares: Tensor) -> Tensor:
        """Extrapolate sums over the sites that each device trained `[K]` to all sites.

        Each site counts with the median of the squared changes there, so that a device that trained half of the sites
        can be compared with the others. NaN for a device that trained no site.
        """
        typical = self._typical()
        return squares * typical.sum() / (typical[:, None] * self.trained).sum(0)

    def _common_squares(self) -> Tensor:
        """Compute ‖C_i‖² over the sites that device j trained, `[K, K]`."""
        return self.squares.T @ self.trained.double()

    def _typical(self) -> Tensor:
        """Compute the median of ‖C_k‖² at each site over the devices that trained it, `[sites]`.

        Uniform over the trained sites if nothing has changed.
        """
        medians = self.squares.masked_fill(~self.trained, float("nan")).nanmedian(dim=1).values.nan_to_num()
        return medians if medians.any() else self.trained.any(dim=1).to(medians)


class RobustRule(Protocol):
    """Rule that assigns a weight and a scale to each update.

    A class may also declare `conflicts` (`strategies.declarations`), and `reduces_large_products`. The parameters of
    its constructor are its options.
    """

    sensitivity: Filtering

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        """Return the same devices with new weights and scales.

        At least one device has nonzero weight before, and at least one after.
        """
        ...


class EntrywiseRule(Protocol):
    """Rule that combines all changes into one, entry by entry."""

    sensitivity: Filtering

    def combine(self, changes: Tensor) -> Tensor:
        """Combine the values of each entry over all devices, `[K, …]` → `[…]`; K ≥ 1.

        May overwrite its input to save memory.
        """
        ...


RobustRules = Sequence[RobustRule]
