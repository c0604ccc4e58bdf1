"""HetLoRA: padded factors, devices weighted by the norm of their product (Cho et al., 2024, arXiv:2401.06432).

A device whose product is small learned little, and counts for little. The paper's devices also prune their own
rank as they train; here a plan says the rank, so that this part is left out.
"""

from __future__ import annotations

import torch

from models.lora.adapter import Adapter, Factors, rank
from models.lora.norm_bound import squared_norm
from strategies.aggregation import Aggregated, Linearity, SiteUpdates, Updates, always, check, shares
from strategies.aggregation.factored import mean_residual


class HetLoRA:
    """Σ w_k A_k and Σ w_k B_k, with w_k ∝ p_k ‖B_k A_k‖_F at each site; of missing directions the factors are zero."""

    mixed_ranks = True
    stable_factors = True
    trains = staticmethod(always("both"))
    sensitivity = Linearity(
        linear=False,
        reason="a device's weight is the norm of its product among everybody's: one device decides about the others'",
    )

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        """The weighted factors, at the rank of `current`.

        `residual` is the relative distance of their product from the true mean of what devices made of the adapter.
        """
        check(updates)
        found, residuals = dict(current), []
        for site, before in current.items():
            if there := shares(updates, site):
                found[site] = padded_mean(before, there)
                residuals.append(mean_residual(found[site], before, there))
        return Aggregated(found, {"rank": float(rank(current)), "residual": sum(residuals) / max(1, len(residuals))})


def padded_mean(before: Factors, there: SiteUpdates) -> Factors:
    """The weighted factors of one site, float32; if all products are zero, p_k alone are the weights.

    Directions beyond everybody's rank stay as they were: zeros on both sides could never learn again.
    """
    norms = [float(squared_norm(factors.a.double(), factors.b.double()).sqrt()) for factors, _ in there]
    weights = [p * norm for (_, p), norm in zip(there, norms, strict=True)]
    if not any(weights):
        weights = [p for _, p in there]
    a, b = (torch.zeros_like(factor, dtype=torch.float64) for factor in before)
    for (factors, _), weight in zip(there, weights, strict=True):
        a[: len(factors.a)] += weight * factors.a.double()
        b[:, : len(factors.a)] += weight * factors.b.double()
    a, b = (a / sum(weights)).float(), (b / sum(weights)).float()
    most = max(len(factors.a) for factors, _ in there)
    return Factors(torch.cat([a[:most], before.a[most:]]), torch.cat([b[:, :most], before.b[:, most:]], dim=1))
