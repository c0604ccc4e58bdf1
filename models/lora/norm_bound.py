"""How large an adapter may be that a stranger sent: the same for server and device."""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors

MAX_NORM = 100.0
"""Bound on ‖A‖_F, ‖B‖_F and ‖B A‖_F at one site: a fresh A of rank r has √r, and a layer's own W about √out.

It bounds every entry too. With the product bounded the next adapter can't be one that honest devices refuse.
"""


def norm_violation(adapter: Adapter, most: float = MAX_NORM) -> str | None:
    """The first site where a factor or the product has a norm over `most`, in words; None if there is none.

    Norms are computed here, in float64, from what came: what a sender says of them is never asked.
    """
    if not adapter:
        return None
    norms = torch._foreach_norm([factor for pair in adapter.values() for factor in pair], dtype=torch.float64)
    of_factors = iter(torch.stack(norms).tolist())
    for (site, factors), of_a, of_b in zip(adapter.items(), of_factors, of_factors, strict=True):
        # ‖B A‖ ≤ ‖B‖ ‖A‖: most products need not be looked at
        of_product = 0.0 if of_a * of_b <= most else _product_norm(factors)
        for norm in (of_a, of_b, of_product):
            if not norm <= most:
                return f"{site}: norm {norm:.3g} is over {most:g}"
    return None


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖B A‖²_F = tr((BᵀB)(A Aᵀ)); a [r, in], b [out, r]. The product is formed where it is smaller than its factors."""
    if a.shape[1] * b.shape[0] <= a.numel() + b.numel():
        return (b @ a).square().sum()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0)


def _product_norm(factors: Factors) -> float:
    return float(squared_norm(factors.a.double(), factors.b.double()).sqrt())
