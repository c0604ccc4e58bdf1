"""Adapters of another rank: the best approximation of a smaller one, or the same product with free directions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.lora.adapter import Adapter, Factors


def with_rank(adapter: Adapter, rank: int, fresh: Adapter) -> Adapter:
    """Return an adapter of this rank with the same product, or the best approximation of it.

    Further directions have A of `fresh` and B = 0, so that they can be trained. Too many directions are reduced to
    those with the largest singular values (Eckart and Young, 1936), from QR decompositions of the factors.

    Args:
        adapter: A [r, in] and B [out, r] per site.
        rank: rank of the result.
        fresh: A [rank, in] per site, for further directions.
    """
    return {name: _resized(f, rank, fresh[name]) for name, f in adapter.items()}


def _resized(factors: Factors, rank: int, fresh: Factors) -> Factors:
    a, b = factors
    if len(a) <= rank:
        return Factors(torch.cat([a, fresh.a[: rank - len(a)]]), F.pad(b, (0, rank - len(a))))
    left, small_b = torch.linalg.qr(b.double())
    right, small_a = torch.linalg.qr(a.T.double())
    u, values, vh = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    directions = len(root)  # fewer than `rank` if the layer is that small
    reduced = Factors(
        (root[:, None] * vh[:rank] @ right.T).to(a).contiguous(), (left @ u[:, :rank] * root).to(b).contiguous()
    )
    return reduced if directions == rank else _resized(reduced, rank, fresh)
