"""How large an adapter may be that a stranger sent: the same for server and device."""

from __future__ import annotations

from torch import Tensor

from models.adapter import Adapter, Factors

MOST_NORM = 100.0
"""Bound on ‖A‖_F, ‖B‖_F and ‖B A‖_F at one site: a fresh A of rank r has √r, and a layer's own W about √out.

It bounds every entry too. With the product bounded the next adapter can't be one that honest devices refuse.
"""


def excess(adapter: Adapter, most: float = MOST_NORM) -> str | None:
    """The first site where a factor or the product has a norm over `most`, in words; None if there is none.

    Norms are computed here, in float64, from what came: what a sender says of them is never asked.
    """
    for site, factors in adapter.items():
        norm = _largest_norm(factors, most)
        if not norm <= most:
            return f"{site}: norm {norm:.3g} is over {most:g}"
    return None


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖B A‖²_F = tr((BᵀB)(A Aᵀ)), without forming the product; a [r, in], b [out, r]."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0)


def _largest_norm(factors: Factors, most: float) -> float:
    a, b = factors.a.double(), factors.b.double()
    of_a, of_b = float(a.norm()), float(b.norm())
    if max(of_a, of_b) > most or of_a * of_b <= most:  # ‖B A‖ ≤ ‖B‖ ‖A‖: most products need not be looked at
        return max(of_a, of_b)
    if a.shape[0] < min(a.shape[1], b.shape[0]):
        return max(of_a, of_b, float(squared_norm(a, b).sqrt()))
    return max(of_a, of_b, float((b @ a).norm()))
