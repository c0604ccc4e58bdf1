"""AFA: remove updates that point in another direction (Muñoz-González et al., 2019, arXiv:1909.05125, algorithm 1).

If the data of people differ, their changes are nearly orthogonal and distances carry no information. Flipped and stale
changes lack the small component that honest changes have in common.
"""

from __future__ import annotations

from torch import Tensor

from strategies.robust import Filtering, UpdateGeometry, robust_rule

_SIGMA = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_EVEN = 1e-9  # a smaller spread of cosines is rounding error


@robust_rule("afa")
class AFA:
    """Remove devices more than ξ σ from the median similarity, on the side of the mean; repeat with ξ + Δξ.

    Two differences from the paper: similarity is Σ p_j cos(C_k, C_j) / Σ p_j over the other devices with a common site,
    and not the cosine with an aggregate that includes C_k, where a large C_k counts more. And σ is estimated from the
    median absolute deviation: if one fifth of the devices are outliers on the same side, they widen the standard
    deviation until they are within 2 σ.

    Args:
        xi: ξ of the first pass.
        step: Δξ.
    """

    sensitivity = Filtering(
        bounded=False,
        reason="updates with the direction of the others are kept: one device affects whether others are",
    )

    def __init__(self, *, xi: float = 2.0, step: float = 0.5) -> None:
        if not xi > 0:
            raise ValueError(f"{xi=}: must be over 0")
        if not step >= 0:
            raise ValueError(f"{step=}: must be 0 or more")
        self._xi, self._step = xi, step

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        cosines, common = changes.cosines(), changes.common()
        weights, xi = changes.weights.clone(), self._xi
        while len(active := weights.nonzero()[:, 0]) > 2:
            pairs = active[:, None], active
            similarities = similarity(cosines[pairs], weights[active] * common[pairs])
            removed = outliers(similarities, xi)
            if not removed.any():
                break
            weights[active[removed]] = 0.0
            xi += self._step
        return changes._replace(weights=weights)


def similarity(cosines: Tensor, weights: Tensor) -> Tensor:
    """Average the cosines of each device with the others by weight; NaN without others.

    Args:
        cosines: `[K, K]`.
        weights: weight of the column's device for the row's device, `[K, K]`.

    Returns:
        `[K]`.
    """
    others = weights.clone().fill_diagonal_(0.0)
    return (cosines * others).sum(1) / others.sum(1)


def outliers(values: Tensor, xi: float) -> Tensor:
    """Find values `[K]` more than ξ σ beyond their median, on the side of the mean; bool `[K]`.

    Fewer than half of the values are marked, and NaN never is.
    """
    median = values.nanquantile(0.5)
    sigma = (_SIGMA * (values - median).abs().nanquantile(0.5)).clamp(min=_EVEN)
    return values < median - xi * sigma if values.nanmean() < median else values > median + xi * sigma
