"""RFA: the geometric median of the changes (Pillutla et al., 2019, arXiv:1912.13445)."""

from __future__ import annotations

import torch

from strategies.robust import Filtering, UpdateGeometry, robust_rule

_SMOOTHING = 1e-4  # ν, relative to the median distance from the mean; smaller distances count as ν
_STEPS, _TOLERANCE = 500, 1e-9  # iteration limit; stop if no fraction of the weight moves by more than the tolerance


@robust_rule("geometric_median")
class GeometricMedian:
    """min_z Σ p_k ‖z − C_k‖_F as a reweighted mean: smoothed Weiszfeld algorithm (algorithm 2).

    In every step z is a weighted mean of the changes, so their inner products suffice:
    w_k ← p_k / max(ν, ‖z − C_k‖), z ← Σ w_k C_k / Σ w_k, at each site over the devices that trained it.

    If outliers have the weight fraction τ < 1/2, then however far away they are,
    ‖z − z̄‖ ≤ 2 (1 − τ) / (1 − 2 τ) · max ‖C_k − z̄‖ over the other devices, for any z̄ (Lopuhaä & Rousseeuw, 1991).
    """

    sensitivity = Filtering(
        bounded=False, reason="the weight of a device depends on the other changes: each device affects all weights"
    )
    reduces_large_products = True

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        initial, steps = changes.weights, _STEPS
        weights, floor = initial, 0.0
        trained, squares = changes.group_squares()
        while steps:
            shares = weights * trained
            shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
            along = (changes.gram @ shares[:, :, None])[:, :, 0]  # ⟨z, C_k⟩
            center = (shares * along).sum(1, keepdim=True)  # ⟨z, z⟩
            distances = changes.extrapolate(((squares - 2 * along + center).clamp(min=0) * trained).sum(0)).sqrt()
            distances = distances.where(~distances.isnan(), distances[changes.active].nanmedian())  # trained no site
            floor = floor or _SMOOTHING * float(distances[changes.active].median())
            if not floor > 0:  # most changes are equal, or no device trained
                return changes
            updated = initial / distances.clamp(min=floor)
            updated = updated * (initial.sum() / updated.sum())
            moved = float((updated - weights).abs().max() / initial.sum())
            weights, steps = updated, steps - 1
            if moved <= _TOLERANCE:
                break
        return changes._replace(weights=weights)
