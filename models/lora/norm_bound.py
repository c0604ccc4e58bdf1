"""Bound on the norm of an untrusted adapter, the same for server and device."""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors

MAX_NORM = 100.0
"""Bound on ‖A‖_F, ‖B‖_F and ‖B A‖_F at one site. A fresh A of rank r has norm √r, and a layer's own W about √out.

It also bounds every entry. Because the product is bounded, honest devices never refuse the next adapter.
"""


def norm_violation(adapter: Adapter, limit: float = MAX_NORM) -> str | None:
    """Describe the first site where a factor or the product has a norm over `limit`; None if there is none.

    Norms are computed here in float64 from the received tensors; a sender's claims about them are not used.
    """
    if not adapter:
        return None
    norms = torch._foreach_norm([factor for pair in adapter.values() for factor in pair], dtype=torch.float64)
    factor_norms = iter(torch.stack(norms).tolist())
    for (site, factors), norm_a, norm_b in zip(adapter.items(), factor_norms, factor_norms, strict=True):
        # ‖B A‖ ≤ ‖B‖ ‖A‖: most products need not be computed
        product_norm = 0.0 if norm_a * norm_b <= limit else _product_norm(factors)
        for norm in (norm_a, norm_b, product_norm):
            if not norm <= limit:
                return f"{site}: norm {norm:.3g} is over {limit:g}"
    return None


def is_zero(adapter: Adapter) -> bool:
    """Return whether the product B A is zero at every site, so that the adapter changes nothing."""
    return not any(
        f.a.any() and f.b.any() and float(squared_norm(f.a.double(), f.b.double())) > 0 for f in adapter.values()
    )


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖B A‖²_F = tr((BᵀB)(A Aᵀ)) of a [r, in] and b [out, r]; forms the product if it is the smaller tensor."""
    if a.shape[1] * b.shape[0] <= a.numel() + b.numel():
        return (b @ a).square().sum()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0)


def _product_norm(factors: Factors) -> float:
    return float(squared_norm(factors.a.double(), factors.b.double()).sqrt())
