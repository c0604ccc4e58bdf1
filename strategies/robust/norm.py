"""Bound on the norm of each change of the product (Sun et al., 2019, arXiv:1911.07963, §4)."""

from __future__ import annotations

from strategies.robust import Filtering, UpdateGeometry, robust_rule


@robust_rule("norm_bound")
class NormBound:
    """C_k · min(1, M / ‖C_k‖_F), where M is fixed or `factor` times the median norm (the lower of two medians).

    Args:
        bound: M; None: use the median, which needs no knowledge of typical norms. Honest devices determine it while
            they are more than half.
        factor: multiple of the median.
    """

    sensitivity = Filtering(
        bounded=False,
        reason="the bound may be the median of all norms; privacy=device has its own clip, which is fixed or noised",
    )

    reduces_large_products = True

    def __init__(self, *, bound: float | None = None, factor: float = 1.0) -> None:
        if bound is not None and not bound > 0:
            raise ValueError(f"{bound=}: must be over 0, or null")
        if not factor > 0:
            raise ValueError(f"{factor=}: must be over 0")
        if bound is not None and factor != 1:
            raise ValueError(f"{factor=}: only used while bound is null; remove it")
        self._bound, self._factor = bound, factor

    def reweight(self, changes: UpdateGeometry) -> UpdateGeometry:
        if self._bound is None:
            norms = changes.norms()
            bound = self._factor * float(norms[changes.active].nanmedian())
        else:
            norms = changes.squares.sum(0).clamp(min=0).sqrt()
            bound = self._bound
        return changes.scaled((bound / norms).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0))
