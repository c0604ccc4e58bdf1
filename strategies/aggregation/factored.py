"""Products B A of one site, and sums of them, in factored form, without any out × in matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.lora.adapter import Factors
from models.lora.norm_bound import squared_norm
from strategies.aggregation import SiteUpdates

_EPSILON = torch.finfo(torch.float32).eps  # singular values below it, relative to the first, are input rounding error
_STACK = 512  # directions that are stacked before they are compressed
_EXACT = 256  # up to this many directions are approximated by QR, whose cost is quadratic in their number
_SPARE = 8  # directions kept in addition to the requested ones
_PROBES = 8  # random vectors that estimate the norm of truncated parts


class LowRankProduct(NamedTuple):
    """Best approximation of a product by one of lower rank."""

    a: Tensor
    """`[r, in]`, rows orthonormal."""
    b: Tensor
    """`[out, r]`, columns orthogonal, in descending order of σ."""
    energy: float
    """Fraction of the product that is kept, Σ kept σ² / Σ σ²."""


def compress(
    a: Tensor,
    b: Tensor,
    max_rank: int | None,
    energy: float | None = None,
    *,
    lost: float = 0.0,
    rounding: float = _EPSILON,
) -> LowRankProduct:
    """Compute the best low-rank factors of the product B A (Eckart–Young), in float64.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the singular values of B A are those of the small R_b R_aᵀ. The rank of the
    result is the numerical rank, at most `max_rank`, and no larger than required to keep the fraction `energy`.

    Args:
        a: A `[s, in]`.
        b: B `[out, s]`.
        max_rank: largest rank of the result; None: no limit.
        energy: fraction of Σ σ² to keep; None: all.
        lost: Σ σ² of parts that were truncated from the product earlier; it counts as truncated here.
        rounding: rounding error of the inputs, relative to the first singular value. Smaller singular values are
            treated as zero.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = sigma.square().cumsum(0)
    total = kept[-1:] + lost
    r = int((sigma > rounding * sigma[:1]).sum())
    if max_rank is not None:
        r = min(r, max_rank)
    if energy is not None and r:
        r = min(r, 1 + int((kept < energy * total).sum()))
    fraction = float(kept[r - 1] / total) if r else 1.0
    return LowRankProduct(vh[:r] @ q_a.T, q_b @ (u[:, :r] * sigma[:r]), fraction)


class ProductSum:
    """Σ B_k A_k of one site, accumulated term by term in memory that does not grow with the number of terms.

    Terms are stacked, and a full stack is compressed. If `max_rank` leaves room for every direction of the site,
    nothing is lost. Otherwise `max_rank` directions and a few spare ones are kept, by a randomized SVD with one power
    iteration (Halko, Martinsson & Tropp, 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).

    Args:
        inputs: columns of A.
        outputs: rows of B.
        max_rank: largest rank that `best` is called with; None: no limit.
        seed: seed of the random vectors.
    """

    def __init__(self, *, inputs: int, outputs: int, max_rank: int | None, seed: int) -> None:
        side = min(inputs, outputs)
        self._keep = side if max_rank is None else min(side, max_rank + _SPARE)
        self._whole = self._keep == side
        self._room = max(_STACK, 2 * self._keep)
        dtype = torch.float64 if self._whole else torch.float32
        self._a, self._b = torch.empty(self._room, inputs, dtype=dtype), torch.empty(self._room, outputs, dtype=dtype)
        self._size = 0  # rows of both buffers that are in use
        self._generator = torch.Generator().manual_seed(seed)
        self._probes = torch.randn(inputs, _PROBES, generator=self._generator)
        self._cut: Tensor | None = None  # truncated parts times the probes

    def add(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Add one term.

        Args:
            a: A `[r, in]`.
            b: B `[out, r]`.
            weight: factor of the product B A.
        """
        done, rank = 0, a.shape[0]
        while done < rank:
            if self._size == self._room:
                self._fold()
            step = min(rank - done, self._room - self._size)
            rows = slice(self._size, self._size + step)
            self._a[rows] = a[done : done + step]
            torch.mul(b.T[done : done + step], weight, out=self._b[rows])
            self._size, done = self._size + step, done + step

    def best(self, *, max_rank: int | None, energy: float | None = None) -> LowRankProduct:
        """Compute the best low-rank approximation of the sum (see `compress`).

        If parts were truncated while terms were added, its `energy` is estimated with the probes.
        """
        if not self._whole and self._size > (max(_EXACT, self._keep) if self._cut is None else self._keep):
            self._fold()
        a, b = self._stack()
        if self._cut is None:
            return compress(a, b, max_rank, energy)
        lost = float(self._cut.square().sum()) / _PROBES
        return compress(a, b, max_rank, energy, lost=lost, rounding=_EPSILON * self._room**0.5)

    def _stack(self) -> tuple[Tensor, Tensor]:
        """Return the stacked A `[size, in]` and B `[out, size]`."""
        return self._a[: self._size], self._b[: self._size].T

    def _fold(self) -> None:
        """Compress the stack in place."""
        a, b = self._stack()
        if self._whole:
            a, b, _ = compress(a, b, None)
        else:
            a, b, cut = self._sketch(a, b)
            self._cut = cut if self._cut is None else self._cut + cut
        self._size = len(a)
        self._a[: self._size], self._b[: self._size] = a, b.T

    def _sketch(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Approximate a product by factors of rank `keep`, close to the best ones of this rank.

        Returns:
            A' `[keep, in]`, orthonormal B' `[out, keep]`, and the truncated part times the probes `[out, probes]`.
        """
        random = torch.randn(a.shape[1], self._keep, generator=self._generator)
        images = b @ (a @ torch.cat([random, self._probes], dim=1))
        q = torch.linalg.qr(images[:, : self._keep]).Q
        q = torch.linalg.qr(b @ (a @ torch.linalg.qr(((q.T @ b) @ a).T).Q)).Q
        to_a = (q.T @ b) @ a
        return to_a, q, images[:, self._keep :] - q @ (to_a @ self._probes)


def stacked_mean(current: Factors, updates: SiteUpdates) -> tuple[Tensor, Tensor]:
    """Compute the exact mean Σ p_k ΔW_k of one site as uncompressed factors.

    Device k trained the first r_k directions of the current factors (A_g, B_g) and left the others unchanged, so
    ΔW_k = B_k A_k + B_g[:, r_k:] A_g[r_k:]. In the sum, direction j of the current factors has the weight
    w_j = Σ {p_k : r_k ≤ j}.

    Args:
        current: factors that the round started from.
        updates: updates of at least one device.

    Returns:
        A `[S, in]` and B `[out, S]`, float64.
    """
    tail = _untrained(current, updates)
    a = torch.cat([*(factors.a.double() for factors, _ in updates), tail.a])
    return a, torch.cat([*(p * factors.b.double() for factors, p in updates), tail.b], dim=1)


def _untrained(current: Factors, updates: SiteUpdates) -> Factors:
    """Collect the current directions that a device did not train, with the total weight of those devices, float64."""
    ranks = [len(factors.a) for factors, _ in updates]
    smallest = min(ranks)
    columns = range(smallest, len(current.a))
    left = [sum(p for (_, p), rank in zip(updates, ranks, strict=True) if rank <= j) for j in columns]
    weights = torch.tensor(left, dtype=torch.float64)
    return Factors(current.a[smallest:].double(), current.b[:, smallest:].double() * weights)


def mean_residual(result: Factors, current: Factors, updates: SiteUpdates) -> float:
    """Compute the relative distance of a product from the exact mean (see `relative_residual`).

    If all devices together have more directions than the smaller side of the matrix, the mean is formed as an out × in
    matrix, so that memory does not grow with the number of devices.

    Args:
        result: factors of the product.
        current: factors that the round started from.
        updates: updates of at least one device.
    """
    sides = len(result.b), result.a.shape[1]
    if sum(len(factors.a) for factors, _ in updates) < min(sides):
        return relative_residual(*result, *stacked_mean(current, updates))
    tail = _untrained(current, updates)
    mean = tail.b @ tail.a
    for (a, b), p in updates:
        mean.addmm_(b.double(), a.double(), alpha=p)
    return product_residual(result, mean)


def product_residual(result: Factors, mean: Tensor) -> float:
    """Compute the relative distance of a product from a matrix `[out, in]`, float64; 0 if the matrix is 0."""
    norm = float(mean.norm())
    return float((result.b.double() @ result.a.double() - mean).norm()) / norm if norm else 0.0


def relative_residual(a: Tensor, b: Tensor, to_a: Tensor, to_b: Tensor) -> float:
    """Compute ‖B A − B' A'‖_F / ‖B' A'‖_F in float64; 0 if the denominator is 0.

    Args:
        a: A `[r, in]`.
        b: B `[out, r]`.
        to_a: A' `[s, in]`.
        to_b: B' `[out, s]`.
    """
    a, b, to_a, to_b = (factor.double() for factor in (a, b, to_a, to_b))
    reference = squared_norm(to_a, to_b)
    if reference == 0:
        return 0.0
    return float((squared_norm(torch.cat([a, to_a]), torch.cat([b, -to_b], dim=1)) / reference).sqrt())


def pad(factors: Factors, size: int, seed: int) -> Factors:
    """Pad factors to `size` directions with a random A and a zero B, float32.

    The product is unchanged, and B still has a gradient; with zeros on both sides a direction could never learn.

    Args:
        factors: A `[r, in]` and B `[out, r]`, r ≤ size.
        size: number of directions of the result.
        seed: seed of the new rows of A.
    """
    a, b = factors.a.float(), factors.b.float()
    missing = size - len(a)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(missing, a.shape[1], generator=generator) / a.shape[1] ** 0.5
    return Factors(torch.cat([a, fresh]), torch.cat([b, torch.zeros(b.shape[0], missing)], dim=1))
