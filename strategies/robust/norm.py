"""A bound on how far one device may move the product (Sun et al., 2019, arXiv:1911.07963, §4)."""

from __future__ import annotations

from strategies.robust import Filtering, UpdateGeometry


class NormBound:
    """C_k · min(1, M / ‖C_k‖_F): at most M, or `factor` times the median of the norms, the lower one of two.

    Args:
        bound: M; None: by the median, which needs no knowledge of how far devices move, and honest ones set while they
            are more than half.
    """

    sensitivity = Filtering(
        bounded=False,
        reason="the bound may be the median of everybody's norms; privacy=device has a clip of its own, which is fixed "
        "or noised",
    )

    def __init__(self, *, bound: float | None = None, factor: float = 1.0) -> None:
        if not (bound is None or bound > 0) or not factor > 0:
            raise ValueError(f"{bound=} {factor=}: must be over 0")
        self._bound, self._factor = bound, factor

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        if self._bound is None:
            norms = changes.norms()
            bound = self._factor * float(norms[changes.there].nanmedian())
        else:
            norms = changes.squares.sum(0).clamp(min=0).sqrt()
            bound = self._bound
        return changes.scaled((bound / norms).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0))
