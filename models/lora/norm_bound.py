"""Bound on the norm of an untrusted adapter, the same for server and device."""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors

MAX_NORM = 100.0
"""Bound on ‖A‖_F, ‖B‖_F and ‖B A‖_F at one site. A fresh A of rank r has norm √r, and a layer's own W about √out.

It also bounds every entry. Because the product is bounded, honest devices never refuse the next adapter.
"""

_MAX_NUMBERS = 2**22  # of a factor whose float32 norm is used


def norm_violation(adapter: Adapter, limit: float = MAX_NORM) -> str | None:
    """Describe the first site where a factor or the product has a norm over `limit`; None if there is none.

    Norms are computed here from the received tensors; a sender's claims about them are not used. A site that is far
    under the limit in float32 passes, and the others are computed in float64.
    """
    if not adapter:
        return None
    norms = torch.stack(torch._foreach_norm([factor for pair in adapter.values() for factor in pair])).tolist()
    for (site, factors), rough_a, rough_b in zip(adapter.items(), norms[::2], norms[1::2], strict=True):
        far_under = all(norm <= limit / 2 for norm in (rough_a, rough_b, rough_a * rough_b))  # False for NaN
        if far_under and all(map(_has_rough_norm, factors)):
            continue
        norm_a, norm_b = (float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in factors)
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


def _has_rough_norm(factor: Tensor) -> bool:
    """Return whether the norm in the tensor's own precision is within a factor of 0.8 to 1.2 of the exact one.

    A float32 sum of n squares is off by at most n ε of itself, ε = 2⁻²⁴: by 1/4 for the largest n here. Squares that
    are rounded to zero add less than 2⁻¹⁰⁰. Overflow and NaN are never under a bound.
    """
    return factor.dtype in (torch.float32, torch.float64) and factor.numel() <= _MAX_NUMBERS


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖B A‖²_F = tr((BᵀB)(A Aᵀ)) of a [r, in] and b [out, r]; forms the product if it is the smaller tensor."""
    if a.shape[1] * b.shape[0] <= a.numel() + b.numel():
        return (b @ a).square().sum()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0)


def _product_norm(factors: Factors) -> float:
    return float(squared_norm(factors.a.double(), factors.b.double()).sqrt())
