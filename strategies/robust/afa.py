"""AFA: who points elsewhere than the others is left out (Muñoz-González et al., 2019, arXiv:1909.05125, algorithm 1).

Where people differ as much as their pictures, their changes are nearly orthogonal, and distances tell nothing: it is
the little that changes have in common that a flipped or a stale one lacks.
"""

from __future__ import annotations

from torch import Tensor

from strategies.robust import Filtering, UpdateGeometry

_SIGMA = 1.4826  # of a normal distribution, over its median absolute deviation
_EVEN = 1e-9  # a spread of cosines below it is rounding


class AFA:
    """Who is further than ξ σ from the median similarity, on the side that the mean lies on; again with ξ + Δξ.

    Two things differ from the paper. Similarity is Σ p_j cos(C_k, C_j) / Σ p_j over the others that trained a site in
    common, not the cosine with an aggregate that C_k is itself a part of, and the larger it is the more so. And σ is by
    the median of the deviations: a fifth of all, on one side, widens a standard deviation until they are within two.

    Args:
        xi: ξ of the first pass.
        step: Δξ.
    """

    sensitivity = Filtering(
        bounded=False, reason="who points where the others do counts: one device decides whether the others do"
    )

    def __init__(self, *, xi: float = 2.0, step: float = 0.5) -> None:
        if not (xi > 0 and step >= 0):
            raise ValueError(f"{xi=} {step=}: must be over 0, and 0 or more")
        self._xi, self._step = xi, step

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        cosines, common = changes.cosines(), changes.common()
        weights, xi = changes.weights.clone(), self._xi
        while len(there := weights.nonzero()[:, 0]) > 2:
            pairs = there[:, None], there
            similar = similarity(cosines[pairs], weights[there] * common[pairs])
            apart = outlying(similar, xi)
            if not apart.any():
                break
            weights[there[apart]] = 0.0
            xi += self._step
        return changes._replace(weights=weights)


def similarity(cosines: Tensor, weights: Tensor) -> Tensor:
    """Mean of each one's cosines [K, K] with the others, [K], by weights [K, K]; NaN where it has none."""
    others = weights.clone().fill_diagonal_(0.0)
    return (cosines * others).sum(1) / others.sum(1)


def outlying(values: Tensor, xi: float) -> Tensor:
    """Which of K values are beyond ξ σ on the heavier side of their median, bool [K]; never half, and no NaN."""
    middle = values.nanquantile(0.5)
    sigma = (_SIGMA * (values - middle).abs().nanquantile(0.5)).clamp(min=_EVEN)
    return values < middle - xi * sigma if values.nanmean() < middle else values > middle + xi * sigma
