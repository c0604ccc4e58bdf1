"""RFA: the geometric median of the changes (Pillutla et al., 2019, arXiv:1912.13445)."""

from __future__ import annotations

import torch

from strategies.robust import Filtering, UpdateGeometry

_SMOOTHING = 1e-4  # ν, relative to the median distance from the mean: nearer than so is no better
_STEPS, _CLOSE = 500, 1e-9  # of the iteration; it ends when no share of the weights moves by more


class GeometricMedian:
    """min_z Σ p_k ‖z − C_k‖_F, as a mean with other weights: smoothed Weiszfeld (algorithm 2).

    z is a weighted mean of the changes in every step, so that their inner products are all it takes:
    w_k ← p_k / max(ν, ‖z − C_k‖), z ← Σ w_k C_k / Σ w_k, at each site over those who trained it.

    Of outliers with less than half of the weight, τ, however far away: ‖z − z̄‖ ≤ 2 (1 − τ) / (1 − 2 τ) · max ‖C_k − z̄‖
    over the others, for any z̄ (Lopuhaä & Rousseeuw, 1991).
    """

    sensitivity = Filtering(
        bounded=False, reason="a device's weight follows from where the others are: each decides about the others"
    )

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        given, steps = changes.weights, _STEPS
        weights, floor = given, 0.0
        trained, squares = changes.group_squares()
        while steps:
            shares = weights * trained
            shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
            along = (changes.gram @ shares[:, :, None])[:, :, 0]  # ⟨z, C_k⟩
            middle = (shares * along).sum(1, keepdim=True)  # ⟨z, z⟩
            apart = changes.whole(((squares - 2 * along + middle).clamp(min=0) * trained).sum(0)).sqrt()
            apart = apart.where(~apart.isnan(), apart[changes.there].nanmedian())  # who trained no site
            floor = floor or _SMOOTHING * float(apart[changes.there].median())
            if not floor > 0:  # most are in one place, or nobody trained
                return changes
            found = given / apart.clamp(min=floor)
            found = found * (given.sum() / found.sum())
            moved = float((found - weights).abs().max() / given.sum())
            weights, steps = found, steps - 1
            if moved <= _CLOSE:
                break
        return changes._replace(weights=weights)
