"""HetLoRA: padded factors, devices weighted by the norm of their product (Cho et al., 2024, arXiv:2401.06432).

A device with a small product has learned little and gets a small weight. Devices in the paper also prune their own rank
during training; here the plan determines the rank, so this part is left out.
"""

from __future__ import annotations

import torch

from models.lora.adapter import Adapter, Factors, rank
from models.lora.norm_bound import squared_norm
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
from strategies.declarations import Conflict


@aggregation("hetlora")
class HetLoRA:
    """Σ w_k A_k and Σ w_k B_k, with w_k ∝ p_k ‖B_k A_k‖_F at each site and zeros for missing directions."""

    mixed_ranks = True
    stable_factors = True
    trains = staticmethod(in_every_round("both"))
    conflicts = (
        Conflict(
            "robust",
            "{name} reduces large products, and hetlora weights devices by the norm of their product, which undoes it; "
            "use krum, or aggregation=exact",
            trait="reduces_large_products",
        ),
    )
    sensitivity = Linearity(
        linear=False,
        reason="the weight of a device is the norm of its product relative to all norms: one device affects the "
        "weights of the others",
    )

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        """Average the weighted factors, at the rank of `current`.

        Diagnostics: `residual`, the relative distance of their product from the exact mean of the devices' products.
        """
        check_updates(updates)
        adapter, residuals = dict(current), []
        for site, before in current.items():
            if trained := site_updates(updates, site):
                adapter[site] = padded_mean(before, trained)
                residuals.append(mean_residual(adapter[site], before, trained))
        return Aggregated(adapter, {"rank": float(rank(current)), "residual": sum(residuals) / max(1, len(residuals))})


def padded_mean(before: Factors, updates: SiteUpdates) -> Factors:
    """Compute the weighted mean of the factors of one site, float32; if all products are zero, the weights are p_k.

    Directions beyond the largest trained rank stay unchanged: with zeros on both sides they could never learn again.
    """
    norms = [float(squared_norm(factors.a.double(), factors.b.double()).sqrt()) for factors, _ in updates]
    weights = [p * norm for (_, p), norm in zip(updates, norms, strict=True)]
    if not any(weights):
        weights = [p for _, p in updates]
    a, b = (torch.zeros_like(factor, dtype=torch.float64) for factor in before)
    for (factors, _), weight in zip(updates, weights, strict=True):
        a[: len(factors.a)] += weight * factors.a.double()
        b[:, : len(factors.a)] += weight * factors.b.double()
    a, b = (a / sum(weights)).float(), (b / sum(weights)).float()
    largest = max(len(factors.a) for factors, _ in updates)
    return Factors(
        torch.cat([a[:largest], before.a[largest:]]), torch.cat([b[:, :largest], before.b[:, largest:]], dim=1)
    )
