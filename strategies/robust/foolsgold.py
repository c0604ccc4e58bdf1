"""FoolsGold: those who send the same are one (Fung et al., 2018, arXiv:1808.04866, algorithm 1, of one round).

People differ, so that their changes do; who colludes towards one aim is known by sending nearly one change. No distance
tells: to each other colluders are the nearest of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.robust import Filtering, UpdateGeometry


class FoolsGold:
    """Weights by 1 − v_k, v_k the largest cosine of C_k and another's, sharpened by a logit; κ = 1 as in the paper.

    Pardoned is who is like somebody that is more like others: cos_ij · v_i / v_j counts if v_j > v_i. The paper sums up
    changes over the rounds: ours are of factors that turn, and of devices that come and go.
    """

    sensitivity = Filtering(
        bounded=False, reason="who resembles others loses weight: one device decides whether another counts"
    )

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        squares = changes.squares.sum(0)
        there = ((changes.weights > 0) & (squares > 0)).nonzero()[:, 0]  # who changed nothing resembles nobody
        weights = changes.weights.clone()
        weights[there] *= originality(changes.among(there).cosines())
        return changes._replace(weights=weights) if weights.any() else changes


def originality(cosines: Tensor) -> Tensor:
    """α_k in [0, 1] of cosines [K, K]: 1 for the most original."""
    if not len(cosines):
        return cosines.new_zeros(0)
    others = cosines.clone().fill_diagonal_(0.0).clamp(0.0, 1.0)
    most = others.amax(dim=1)
    pardon = (most[:, None] / most.clamp(min=1e-12)).clamp(max=1.0)  # of i, compared with j
    alike = (others * pardon).amax(dim=1)
    alpha = 1 - alike
    if not alpha.any():
        return alpha
    alpha = (alpha / alpha.max()).clamp(1e-9, 1 - 1e-9)
    return (torch.logit(alpha) + 0.5).clamp(0.0, 1.0)
