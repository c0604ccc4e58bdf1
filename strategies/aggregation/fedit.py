"""FedIT: the mean of A and the mean of B (Zhang et al., 2023, arXiv:2305.05644).

The product of the means is not the mean of the products: Σ p (B − B̄)(A − Ā) is lost. The baseline.
"""

from __future__ import annotations

from conf.errors import AntherError
from models.adapter import Adapter, Factors, rank
from strategies.aggregation import (
    Aggregated,
    Linearity,
    Updates,
    normalised,
    relative_residual,
    stacked_mean,
)


class FedIT:
    """Weighted mean of each factor, equal ranks only."""

    mixed_ranks = False
    sensitivity = Linearity(linear=True, reason="a mean of factors")

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        """The mean factors; `residual` is the relative distance of their product from the mean product.

        Raises AntherError if ranks differ.
        """
        shares = normalised(updates)
        ranks = sorted({rank(adapter) for adapter, _ in updates} | {rank(current)})
        if len(ranks) > 1:
            raise AntherError(f"fedit averages adapters of one rank, got {ranks}: use strategy=exact for mixed ranks")
        adapter: Adapter = {}
        for site in current:
            factors = [update[site] for update, _ in updates]
            a = sum(p * f.a.double() for p, f in zip(shares, factors, strict=True))
            b = sum(p * f.b.double() for p, f in zip(shares, factors, strict=True))
            adapter[site] = Factors(a.float(), b.float())  # type: ignore[union-attr]  # sum of one or more tensors
        residuals = [relative_residual(*adapter[site], *stacked_mean(current, updates, site)) for site in current]
        return Aggregated(adapter, {"rank": float(ranks[0]), "residual": sum(residuals) / len(residuals)})
