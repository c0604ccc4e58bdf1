"""Products B A of one site, and sums of them, by their factors: no out × in matrix is ever made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.lora.adapter import Factors
from models.lora.norm_bound import squared_norm
from strategies.aggregation import SiteUpdates

_EPSILON = torch.finfo(torch.float32).eps  # singular values below it, relative to the first, are rounding of the inputs
_STACK = 512  # directions that are stacked before they are compressed
_EXACT = 256  # directions of which the best approximation is made by QR, which costs the square of their number
_SPARE = 8  # directions kept beside those that are wanted
_PROBES = 8  # random vectors that what is cut on the way is measured with


class LowRankProduct(NamedTuple):
    """The best approximation of a product by one of lower rank."""

    a: Tensor
    """[r, in], rows orthonormal."""
    b: Tensor
    """[out, r], columns orthogonal, in falling order of σ."""
    energy: float
    """What is kept of it, Σ kept σ² / Σ σ²."""


def compress(
    a: Tensor,
    b: Tensor,
    max_rank: int | None,
    energy: float | None = None,
    *,
    lost: float = 0.0,
    rounding: float = _EPSILON,
) -> LowRankProduct:
    """The best factors of the product B A (Eckart–Young), in float64.

    With B = Q_b R_b and Aᵀ = Q_a R_a the singular values of B A are those of the small R_b R_aᵀ. r is the numerical
    rank, at most `max_rank`, and no more than the share `energy` needs.

    Args:
        lost: Σ σ² of what is missing from the product, and counts as not kept.
        rounding: of the inputs, relative to the first singular value; what is below it is none.
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
    share = float(kept[r - 1] / total) if r else 1.0
    return LowRankProduct(vh[:r] @ q_a.T, q_b @ (u[:, :r] * sigma[:r]), share)


class ProductSum:
    """Σ B_k A_k of one site, term after term, in memory that does not grow with their number.

    Terms are stacked, and a full stack is compressed. If `max_rank` leaves room for every direction that the site has,
    nothing is lost. Otherwise a few directions more than it are kept, by a randomised SVD with one power iteration
    (Halko, Martinsson & Tropp, 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).

    Args:
        max_rank: the most directions that are going to be asked for; None: all.
        seed: of the random vectors.
    """

    def __init__(self, *, inputs: int, outputs: int, max_rank: int | None, seed: int) -> None:
        side = min(inputs, outputs)
        self._keep = side if max_rank is None else min(side, max_rank + _SPARE)
        self._whole = self._keep == side
        self._room = max(_STACK, 2 * self._keep)
        dtype = torch.float64 if self._whole else torch.float32
        self._a, self._b = torch.empty(self._room, inputs, dtype=dtype), torch.empty(self._room, outputs, dtype=dtype)
        self._size = 0  # rows of both that are in use
        self._generator = torch.Generator().manual_seed(seed)
        self._probes = torch.randn(inputs, _PROBES, generator=self._generator)
        self._cut: Tensor | None = None  # what was lost on the way, times the probes

    def add(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """One more term, `weight` times the product of a [r, in] and b [out, r]."""
        done, rank = 0, a.shape[0]
        while done < rank:
            if self._size == self._room:
                self._fold()
            step = min(rank - done, self._room - self._size)
            here = slice(self._size, self._size + step)
            self._a[here] = a[done : done + step]
            torch.mul(b.T[done : done + step], weight, out=self._b[here])
            self._size, done = self._size + step, done + step

    def best(self, *, max_rank: int | None, energy: float | None = None) -> LowRankProduct:
        """The best approximation of the sum, as `compress` makes it of the stack.

        Its energy is estimated from the probes where something was cut on the way.
        """
        if not self._whole and self._size > (max(_EXACT, self._keep) if self._cut is None else self._keep):
            self._fold()
        a, b = self._stack()
        if self._cut is None:
            return compress(a, b, max_rank, energy)
        lost = float(self._cut.square().sum()) / _PROBES
        return compress(a, b, max_rank, energy, lost=lost, rounding=_EPSILON * self._room**0.5)

    def _stack(self) -> tuple[Tensor, Tensor]:
        """A [size, in] and B [out, size]."""
        return self._a[: self._size], self._b[: self._size].T

    def _fold(self) -> None:
        a, b = self._stack()
        if self._whole:
            a, b, _ = compress(a, b, None)
        else:
            a, b, cut = self._sketch(a, b)
            self._cut = cut if self._cut is None else self._cut + cut
        self._size = len(a)
        self._a[: self._size], self._b[: self._size] = a, b.T

    def _sketch(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors A' [keep, in] and orthonormal B' [out, keep] of a product near the best one of this rank.

        With what it lacks, times the probes.
        """
        random = torch.randn(a.shape[1], self._keep, generator=self._generator)
        seen = b @ (a @ torch.cat([random, self._probes], dim=1))
        q = torch.linalg.qr(seen[:, : self._keep]).Q
        q = torch.linalg.qr(b @ (a @ torch.linalg.qr(((q.T @ b) @ a).T).Q)).Q
        to_a = (q.T @ b) @ a
        return to_a, q, seen[:, self._keep :] - q @ (to_a @ self._probes)


def stacked_mean(current: Factors, there: SiteUpdates) -> tuple[Tensor, Tensor]:
    """The true mean Σ p_k ΔW_k of one site as factors A [S, in], B [out, S], float64, not compressed.

    Device k trained the first r_k directions of the current factors (A_g, B_g) and left the others as they
    were, so ΔW_k = B_k A_k + B_g[:, r_k:] A_g[r_k:]. Summed, direction j of the current factors stays with weight
    w_j = Σ {p_k : r_k ≤ j}.

    Args:
        there: the `shares` of at least one device.
    """
    tail = _left(current, there)
    a = torch.cat([*(factors.a.double() for factors, _ in there), tail.a])
    return a, torch.cat([*(p * factors.b.double() for factors, p in there), tail.b], dim=1)


def _left(current: Factors, there: SiteUpdates) -> Factors:
    """The current directions that not everyone trained, each with the weight of those who left it, float64."""
    ranks = [len(factors.a) for factors, _ in there]
    kept = min(ranks)
    columns = range(kept, len(current.a))
    left = [sum(p for (_, p), rank in zip(there, ranks, strict=True) if rank <= j) for j in columns]
    weights = torch.tensor(left, dtype=torch.float64)
    return Factors(current.a[kept:].double(), current.b[:, kept:].double() * weights)


def mean_residual(found: Factors, current: Factors, there: SiteUpdates) -> float:
    """How far a product is from the true mean, relative to that (`relative_residual`).

    Of more directions than the site has, the mean is formed as the matrix that it is: that many devices take no more
    memory than so few.
    """
    sides = len(found.b), found.a.shape[1]
    if sum(len(factors.a) for factors, _ in there) < min(sides):
        return relative_residual(*found, *stacked_mean(current, there))
    tail = _left(current, there)
    mean = tail.b @ tail.a
    for (a, b), p in there:
        mean.addmm_(b.double(), a.double(), alpha=p)
    whole = float(mean.norm())
    return float((found.b.double() @ found.a.double() - mean).norm()) / whole if whole else 0.0


def relative_residual(a: Tensor, b: Tensor, to_a: Tensor, to_b: Tensor) -> float:
    """‖B A − B' A'‖_F / ‖B' A'‖_F in float64: how far a product is from the one it stands for; 0 if that is 0."""
    a, b, to_a, to_b = (factor.double() for factor in (a, b, to_a, to_b))
    whole = squared_norm(to_a, to_b)
    if whole == 0:
        return 0.0
    return float((squared_norm(torch.cat([a, to_a]), torch.cat([b, -to_b], dim=1)) / whole).sqrt())


def pad(factors: Factors, size: int, seed: int) -> Factors:
    """Float32 factors of `size` directions: the missing ones get a random A and a zero B.

    The product is unchanged and the gradient of B alive: zeros on both sides could never learn.
    """
    a, b = factors.a.float(), factors.b.float()
    missing = size - len(a)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(missing, a.shape[1], generator=generator) / a.shape[1] ** 0.5
    return Factors(torch.cat([a, fresh]), torch.cat([b, torch.zeros(b.shape[0], missing)], dim=1))
