"""FoolsGold: reduce the weight of similar updates (Fung et al., 2018, arXiv:1808.04866, algorithm 1, for one round).

People differ, and so do their changes; colluding attackers with one aim send nearly the same change. Distances can't
detect them: colluders are each other's nearest neighbors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.robust import Filtering, UpdateGeometry, robust_rule


@robust_rule("foolsgold")
class FoolsGold:
    """Weight devices by 1 − v_k, with v_k the largest cosine of C_k and another change, and a logit; κ = 1 as in the
    paper.

    A device is pardoned for similarity to a device with larger v: cos_ij counts as cos_ij · v_i / v_j if v_j > v_i. The
    paper sums the changes over rounds. Here it isn't possible, since factors rotate and devices join and leave.
    """

    sensitivity = Filtering(
        bounded=False, reason="similar updates lose weight: one device affects whether another one counts"
    )

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        squares = changes.squares.sum(0)
        moved = ((changes.weights > 0) & (squares > 0)).nonzero()[:, 0]  # a zero change is similar to none
        weights = changes.weights.clone()
        weights[moved] *= originality(changes.subset(moved).cosines())
        return changes._replace(weights=weights) if weights.any() else changes


def originality(cosines: Tensor) -> Tensor:
    """Compute the weights α_k in [0, 1] from the cosines `[K, K]`; 1 for the least similar device."""
    if not len(cosines):
        return cosines.new_zeros(0)
    others = cosines.clone().fill_diagonal_(0.0).clamp(0.0, 1.0)
    largest = others.amax(dim=1)
    pardon = (largest[:, None] / largest.clamp(min=1e-12)).clamp(max=1.0)  # of i, compared with j
    alike = (others * pardon).amax(dim=1)
    alpha = 1 - alike
    if not alpha.any():
        return alpha
    alpha = (alpha / alpha.max()).clamp(1e-9, 1 - 1e-9)
    return (torch.logit(alpha) + 0.5).clamp(0.0, 1.0)
