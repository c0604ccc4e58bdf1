"""FedIT: the mean of A and the mean of B (Zhang et al., 2023, arXiv:2305.05644).

The baseline. The product of the means is not the mean of the products: Σ p (B − B̄)(A − Ā) is lost.
"""

from __future__ import annotations

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, rank
from strategies.aggregation import (
    Aggregated,
    Linearity,
    SiteUpdates,
    Updates,
    aggregation,
    check_updates,
    in_every_round,
    site_updates,
)
from strategies.aggregation.factored import mean_residual
from strategies.fedbuff import rebase_factors


@aggregation("fedit")
class FedIT:
    """Weighted mean of each factor, for equal ranks only."""

    mixed_ranks = False
    stable_factors = True
    trains = staticmethod(in_every_round("both"))
    rebase = staticmethod(rebase_factors)
    sensitivity = Linearity(linear=True, reason="a mean of factors")

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        """Average the factors.

        Diagnostics: `residual`, the relative distance of the product of the means from the mean product.

        Raises:
            AntherError: ranks differ.
        """
        check_updates(updates)
        adapter, residuals = dict(current), []
        for site, before in current.items():
            trained = site_updates(updates, site)
            ranks = sorted({len(factors.a) for factors, _ in trained} | {len(before.a)})
            if len(ranks) > 1:
                raise AntherError(
                    f"fedit averages adapters of one rank, got {ranks}; use aggregation=exact for mixed ranks"
                )
            if trained:
                adapter[site] = mean_factors(trained)
                residuals.append(mean_residual(adapter[site], before, trained))
        return Aggregated(adapter, {"rank": float(rank(current)), "residual": sum(residuals) / max(1, len(residuals))})


def mean_factors(updates: SiteUpdates) -> Factors:
    """Compute Σ p_k A_k and Σ p_k B_k of one site, for updates of one rank; float32."""
    a = sum(p * factors.a.double() for factors, p in updates)
    b = sum(p * factors.b.double() for factors, p in updates)
    return Factors(a.float(), b.float())  # type: ignore[union-attr]  # sum of one or more tensors
