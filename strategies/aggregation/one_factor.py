"""The mean of one factor where the other is everybody's: the products' own mean, Σ p_k B_k A = (Σ p_k B_k) A."""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors
from strategies.aggregation import SiteUpdates, Updates, check, shares


def factor_mean(factor: str, current: Adapter, updates: Updates) -> Adapter:
    """The mean of A (`a`) or of B (`b`) at each site over the devices that trained it, beside the current other one.

    Exact for ranks that differ: device k trained the first r_k directions of the current adapter and left the others as
    they were, so those of others count with what they were. Float32, from sums in float64.
    """
    check(updates)
    found = dict(current)
    for site, before in current.items():
        if there := shares(updates, site):
            found[site] = (
                Factors(_mean(before.a, there, 0), before.b)
                if factor == "a"
                else Factors(before.a, _mean(before.b, there, 1))
            )
    return found


def _mean(before: Tensor, there: SiteUpdates, which: int) -> Tensor:
    """Σ p_k of one factor, with the directions that a device did not train as they were."""
    total = torch.zeros_like(before, dtype=torch.float64)
    for factors, p in there:
        whole = before.double()
        own = factors[which].double()
        whole[: own.shape[0], : own.shape[1]] = own
        total += p * whole
    return total.to(before.dtype)
