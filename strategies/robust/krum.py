"""Multi-Krum: keep the updates closest to their neighbors (Blanchard et al., 2017, arXiv:1703.02757, §4)."""

from __future__ import annotations

import torch

from strategies.robust import Filtering, UpdateGeometry, robust_rule


@robust_rule("krum")
class MultiKrum:
    """Keep the n − f of n devices with the smallest s(i) = Σ ‖C_i − C_j‖² over the n − f − 2 nearest other devices.

    f is the expected number of Byzantine devices, limited by n ≥ 2 f + 3; with fewer than five devices, all are kept.

    Args:
        outlier_fraction: expected fraction of Byzantine devices.
    """

    sensitivity = Filtering(
        bounded=False, reason="updates near to others are kept: one device affects whether others are"
    )

    def __init__(self, *, outlier_fraction: float = 0.2) -> None:
        if not 0 <= outlier_fraction < 0.5:
            raise ValueError(f"{outlier_fraction=}: must be 0 or more, and under 0.5")
        self._outliers = outlier_fraction

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        active = changes.active
        n = len(active)
        f = min(count(self._outliers, n), (n - 3) // 2)
        if f < 1:
            return changes
        distances = changes.subset(active).distances().square()
        distances = distances.where(~distances.isnan(), distances.nanmedian())  # no common site: neutral
        nearest = distances.fill_diagonal_(torch.inf).sort(dim=1).values
        scores = nearest[:, : n - f - 2].sum(1)
        removed = active[scores.argsort(stable=True)[n - f :]]
        return changes._replace(weights=changes.weights.index_fill(0, removed, 0.0))


def count(fraction: float, n: int) -> int:
    """Compute ⌊fraction · n⌋ without floating point error: 4 of 20 are a fifth."""
    return int(fraction * n + 1e-9)
