"""FedIT: the mean of A and the mean of B (Zhang et al., 2023, arXiv:2305.05644).

The product of the means is not the mean of the products: Σ p (B − B̄)(A − Ā) is lost. The baseline.
"""

from __future__ import annotations

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, rank
from strategies.aggregation import Aggregated, Linearity, SiteUpdates, Updates, always, check, shares
from strategies.aggregation.factored import mean_residual


class FedIT:
    """Weighted mean of each factor, equal ranks only."""

    mixed_ranks = False
    stable_factors = True
    trains = staticmethod(always("both"))
    sensitivity = Linearity(linear=True, reason="a mean of factors")

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        """The mean factors; `residual` is the relative distance of their product from the mean product.

        Raises AntherError if ranks differ.
        """
        check(updates)
        found, residuals = dict(current), []
        for site, before in current.items():
            there = shares(updates, site)
            ranks = sorted({len(factors.a) for factors, _ in there} | {len(before.a)})
            if len(ranks) > 1:
                raise AntherError(
                    f"fedit averages adapters of one rank, got {ranks}: use aggregation=exact for mixed ranks"
                )
            if there:
                found[site] = mean_factors(there)
                residuals.append(mean_residual(found[site], before, there))
        return Aggregated(found, {"rank": float(rank(current)), "residual": sum(residuals) / max(1, len(residuals))})


def mean_factors(there: SiteUpdates) -> Factors:
    """Σ p_k A_k and Σ p_k B_k of one site, for shares of one rank; float32."""
    a = sum(p * factors.a.double() for factors, p in there)
    b = sum(p * factors.b.double() for factors, p in there)
    return Factors(a.float(), b.float())  # type: ignore[union-attr]  # sum of one or more tensors
