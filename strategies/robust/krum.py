"""Multi-Krum: those nearest to their nearest (Blanchard et al., 2017, arXiv:1703.02757, §4)."""

from __future__ import annotations

import torch

from strategies.robust import Filtering, UpdateGeometry


class MultiKrum:
    """Of n devices the n − f with the smallest s(i) = Σ ‖C_i − C_j‖² over the n − f − 2 others that are nearest to i.

    f is the share of n that is expected to be Byzantine, as far as n ≥ 2 f + 3; nobody is left out of fewer than five.
    """

    sensitivity = Filtering(
        bounded=False, reason="who is near to others counts: one device decides whether the others do"
    )

    def __init__(self, *, outliers: float) -> None:
        if not 0 <= outliers < 0.5:
            raise ValueError(f"{outliers=}: must be 0 or more and less than half")
        self._outliers = outliers

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        there = changes.there
        n = len(there)
        f = min(count(self._outliers, n), (n - 3) // 2)
        if f < 1:
            return changes
        apart = changes.among(there).distances().square()
        apart = apart.where(~apart.isnan(), apart.nanmedian())  # who shares no site says nothing for or against
        others = apart.fill_diagonal_(torch.inf).sort(dim=1).values
        scores = others[:, : n - f - 2].sum(1)
        left_out = there[scores.argsort(stable=True)[n - f :]]
        return changes._replace(weights=changes.weights.index_fill(0, left_out, 0.0))


def count(share: float, n: int) -> int:
    """How many of n a share is at most: 4 of 20 are a fifth, whatever floating point makes of it."""
    return int(share * n + 1e-9)
