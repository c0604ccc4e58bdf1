"""FedIT: the mean of A and the mean of B (Zhang et al., 2023, arXiv:2305.05644).

The baseline. The product of the means is not the mean of the products: Σ p (B − B̄)(A − Ā) is lost.
"""

from __future__ import annotations

import torch

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, rank
from strategies.aggregation import (
    Aggregated,
    Linearity,
    Updates,
    aggregation,
    check_updates,
    in_every_round,
)
from strategies.aggregation.factored import product_residual, relative_residual
from strategies.aggregation.stacks import SiteStack
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
            stack = SiteStack(updates, site)
            if len(ranks := sorted({*stack.ranks, before.a.shape[0]})) > 1:
                raise AntherError(
                    f"fedit averages adapters of one rank, got {ranks}; use aggregation=exact for mixed ranks"
                )
            if stack.ranks:
                adapter[site], residual = _mean(stack)
                residuals.append(residual)
        return Aggregated(adapter, {"rank": float(rank(current)), "residual": sum(residuals) / max(1, len(residuals))})


def _mean(stack: SiteStack) -> tuple[Factors, float]:
    """Compute Σ p_k A_k and Σ p_k B_k of one site, float32, and the distance of their product from the mean product.

    The mean product is an out × in matrix if all devices together have more directions than its smaller side, and
    factors of these directions otherwise.
    """
    a, b, product = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    factors = []
    for part in stack.parts():
        a = a + torch.tensordot(part.weights, part.a, 1)
        weighted = part.b.mul_(part.weights[:, None])
        b = b + weighted.sum(1)
        rows, columns = part.a.flatten(0, 1), weighted.flatten(1)
        if stack.directions < min(len(columns), rows.shape[1]):
            factors.append((rows, columns))
        else:
            product = product + columns @ rows
    mean = Factors(a.float(), b.float())
    if factors:
        rows, columns = torch.cat([rows for rows, _ in factors]), torch.cat([columns for _, columns in factors], dim=1)
        return mean, relative_residual(*mean, rows, columns)
    return mean, product_residual(mean, product)
