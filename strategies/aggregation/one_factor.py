"""Mean of one factor if the other one is common to all devices.

It equals the mean of the products: Σ p_k B_k A = (Σ p_k B_k) A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors
from strategies.aggregation import SiteUpdates, Updates, check_updates, site_updates


def factor_mean(factor: str, current: Adapter, updates: Updates) -> Adapter:
    """Average one factor at each site over the devices that trained it, and keep the other one.

    Exact for different ranks too: device k trained the first r_k directions of the current adapter and left the others
    unchanged, so these count with their current values. Sums are float64, the result is float32.

    Args:
        factor: `a` or `b`.
        current: adapter that the round started from.
        updates: at least one update.
    """
    check_updates(updates)
    adapter = dict(current)
    for site, before in current.items():
        if trained := site_updates(updates, site):
            adapter[site] = (
                Factors(_mean(before.a, trained, 0), before.b)
                if factor == "a"
                else Factors(before.a, _mean(before.b, trained, 1))
            )
    return adapter


def _mean(before: Tensor, updates: SiteUpdates, index: int) -> Tensor:
    """Compute the weighted sum of the factor at `index`; untrained directions count with their current values."""
    total = torch.zeros_like(before, dtype=torch.float64)
    for factors, p in updates:
        completed = before.double()
        trained = factors[index].double()
        completed[: trained.shape[0], : trained.shape[1]] = trained
        total += p * completed
    return total.to(before.dtype)
