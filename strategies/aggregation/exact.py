"""The true mean of the adapters' products, in factored form: no out × in matrix is ever made.

The stacked factors of all devices (FLoRA, arXiv:2409.05976) are compressed by QR and a small SVD to the best
adapter of a given rank (Eckart–Young), and turned towards the last round's factors.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from conf.errors import AntherError
from models.adapter import Adapter, Factors, rank
from privacy.noise import stream
from strategies.aggregation import Aggregated, Linearity, Updates, stacked_mean

_EPSILON = torch.finfo(torch.float32).eps  # singular values below it, relative to the first, are rounding of the inputs


class Exact:
    """Mean of products, truncated to `max_rank` (None: every direction that is there).

    The factors come out with A's rows orthonormal and all scale in B. Rows of a fresh A, N(0, 1/in), have norm ≈ 1 too,
    so a learning rate means the same in every round; with √σ on both sides A would shrink by the size of the update
    and the next round would hardly move.
    """

    mixed_ranks = True
    sensitivity = Linearity(
        linear=False,
        reason="a product of two factors isn't linear in them, and the singular vectors that are kept, and how many, "
        "follow from the updates: no clip of one bounds what it does to the mean",
    )

    def __init__(self, *, rank: int, max_rank: int | None, seed: int) -> None:
        if max_rank is not None and max_rank < rank:
            raise AntherError(f"strategy.max_rank={max_rank}: must be at least adapter.shared.rank={rank}, or null")
        self._rank, self._max_rank, self._seed = rank, max_rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """The mean product at one rank for all sites.

        Diagnostics, means over sites: `energy`, Σ kept σ² / Σ σ², and `residual`, the relative distance from the
        mean; `rank`, of the result; `live`, its most directions with a B that is not zero.
        """
        blocks = sorted({rank(adapter) for adapter, _ in updates})
        compressed: Adapter = {}
        energies, residuals = [], []
        for site in current:
            mean = stacked_mean(current, updates, site)
            a, b, energy = compress(*mean, self._max_rank)
            compressed[site] = Factors(*align(a, b, current[site].a.double(), blocks))
            energies.append(energy)
            residuals.append(max(0.0, 1.0 - energy) ** 0.5)  # what was cut is orthogonal to what was kept
        live = rank(compressed)
        size = max(live, self._rank)
        adapter = {
            site: pad(factors, size, stream(self._seed, round, site, "dead directions"))
            for site, factors in compressed.items()
        }
        diagnostics = {
            "rank": float(size),
            "live": float(live),
            "energy": sum(energies) / len(energies),
            "residual": sum(residuals) / len(residuals),
        }
        return Aggregated(adapter, diagnostics)


def compress(a: Tensor, b: Tensor, max_rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The best factors A [r, in], with orthonormal rows, and B [out, r] of the product B A, and the energy they keep.

    With B = Q_b R_b and Aᵀ = Q_a R_a the singular values of B A are those of the small R_b R_aᵀ. Directions come in
    falling order of σ; r is the numerical rank, at most `max_rank`.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    live = int((sigma > _EPSILON * sigma[0]).sum())
    r = live if max_rank is None else min(live, max_rank)
    energy = sigma.square().sum()
    kept = float(sigma[:r].square().sum() / energy) if energy > 0 else 1.0
    return vh[:r] @ q_a.T, q_b @ (u[:, :r] * sigma[:r]), kept


def align(a: Tensor, b: Tensor, towards: Tensor, blocks: list[int]) -> tuple[Tensor, Tensor]:
    """Rotate the directions so that A is as near as it can be to the last round's A; the product stays.

    Orthogonal Procrustes: min ‖Q A − A'‖_F over rotations Q is U Vᵀ of the SVD of A' Aᵀ (Schönemann, 1966).
    Directions rotate only among those before the first of `blocks`, between two of them, or after the last, which are
    the ranks that devices train: whoever trains the first r still holds the r strongest.
    """
    edges = [0, *(edge for edge in blocks if edge < a.shape[0]), a.shape[0]]
    rows, columns = [], []
    for start, end in itertools.pairwise(edges):
        part = a[start:end]
        u, _, vh = torch.linalg.svd(towards[start:end] @ part.T, full_matrices=False)
        q = u @ vh if u.shape == (end - start,) * 2 else torch.eye(end - start, dtype=a.dtype)  # new directions
        rows.append(q @ part)
        columns.append(b[:, start:end] @ q.T)
    return torch.cat(rows), torch.cat(columns, dim=1)


def pad(factors: Factors, size: int, seed: int) -> Factors:
    """Float32 factors of `size` directions: the missing ones get a random A and a zero B.

    The product is unchanged and the gradient of B alive: zeros on both sides could never learn.
    """
    a, b = factors.a.float(), factors.b.float()
    missing = size - a.shape[0]
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(missing, a.shape[1], generator=generator) / a.shape[1] ** 0.5
    return Factors(torch.cat([a, fresh]), torch.cat([b, torch.zeros(b.shape[0], missing)], dim=1))
