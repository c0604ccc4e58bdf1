"""Per-example clipping whose result carries its own guarantee.

Abadi et al. (2016, arXiv:1607.00133), algorithm 1: g ← g · min(1, C / ‖g‖₂), summed over the examples of a batch. The
bound stays with the sums, and the noise is derived from it, so that neither can be meant for another:

    sums = BoundedSums(clients, segments, like=rows)
    sums.open(client, bounds, noise_multiplier)
    sums.add(clients, clip_and_sum(gradients, counts, sums.bounds[clients], segments))  # for each micro-batch
    noised = sums.take(clients, noises)  # the sums + N(0, (σC)²), and empty again
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE

_CHUNK = 256  # numbers whose squares are added in float32 before float64 takes over
_SMALLEST = 1e-12  # a bound under it would be lost among squares that float32 can't hold


class Clipped(NamedTuple):
    """Sums [R, D] of clipped gradients, one for each owner, and how many gradients of each [R] were not finite."""

    values: Tensor
    dropped: Tensor


def clip_and_sum(gradients: Tensor, counts: Tensor, bounds: Tensor, segments: Sequence[int]) -> Clipped:
    """Scale every part of every gradient to its owner's bound, in place, and sum the gradients of each owner.

    A gradient whose norm is not finite counts as zero: a NaN survives min(1, C / NaN) and would carry an unbounded
    row past the clip.

    Formal guarantee: adding or removing one row of `gradients` changes the sum of its owner by at most the L2 norm of
    the owner's bounds (up to rounding, 1 part in 10⁶ in float32), and no other sum at all.

    Args:
        gradients: [N, D], one for each example, those of one owner side by side.
        counts: [R], how many each of the owners has.
        bounds: [R, L], C ≥ 0 of each part: 0 gives zeros, ∞ changes no finite gradient.
        segments: widths of the L parts of a gradient, which sum to D; one part is flat clipping.
    """
    owner_bounds = bounds.repeat_interleave(counts, dim=0, output_size=len(gradients))
    parts = gradients.split(list(segments), dim=1)
    norms = torch.stack([_norm(part) for part in parts], dim=1)
    finite = (norms < torch.finfo(gradients.dtype).max ** 0.5).all(1, keepdim=True)  # of less, C / norm is exact enough
    scales = (owner_bounds / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    scales = torch.where(finite, scales, 0.0).to(gradients.dtype)
    gradients.nan_to_num_(0.0, 0.0, 0.0)  # 0 · NaN would be NaN
    for part, scale in zip(parts, scales.T, strict=True):
        part.mul_(scale[:, None])
    return Clipped(sum_segments(gradients, counts), sum_segments((~finite[:, 0]).to(gradients), counts))


def sum_segments(values: Tensor, counts: Tensor) -> Tensor:
    """Sums over the first axis of `counts` [R] neighbours each, which add up to its length: always in one order."""
    return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True)  # checks would wait for the device


def _norm(rows: Tensor) -> Tensor:
    """L2 norms [N] of rows [N, d], float64: long sums in float32 would lose digits, a copy in float64 takes longer."""
    whole = rows.shape[1] // _CHUNK * _CHUNK
    norms = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _CHUNK)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    return torch.cat([norms, rest], dim=1).double().square().sum(1).sqrt()


class BoundedSums:
    """Sums of clipped gradients, a row [D] for each client, gathered over the micro-batches of its logical batch.

    Formal guarantee: adding or removing one example changes the sum of its client by at most the L2 norm of its
    `bounds`, whatever the other examples are, and the noise that `take` adds is the client's σ times that norm.

    Attributes:
        bounds: [S, L], what each part of an example's gradient is clipped to; ∞ for a client without privacy.
        dropped: [S], examples whose gradient was not finite, since the client was opened.
    """

    relation = ADD_OR_REMOVE_ONE

    def __init__(self, clients: int, segments: Sequence[int], *, like: Tensor) -> None:
        self._values = like.new_zeros(clients, sum(segments))
        self._deviations = [0.0] * clients
        self.bounds = like.new_full((clients, len(segments)), math.inf, dtype=torch.float64)
        self.dropped = like.new_zeros(clients)

    def open(
        self, clients: Sequence[int], bounds: Sequence[Sequence[float]], noise_multipliers: Sequence[float]
    ) -> None:
        """Begin anew for these clients [R], each with the bounds [L] of its clip and its σ; 0 asks for no noise.

        Raises:
            ValueError: a bound is negative, NaN or too small, or no noise could hide the sum.
        """
        for client, parts, sigma in zip(clients, bounds, noise_multipliers, strict=True):
            self._deviations[client] = deviation(parts, sigma)
        index = torch.tensor(clients, device=self._values.device)
        self._values[index] = 0.0
        self.dropped[index] = 0.0
        self.bounds[index] = torch.tensor(bounds, dtype=torch.float64).to(self.bounds)

    def add(self, clients: Tensor, clipped: Clipped) -> None:
        """Add what was clipped to `bounds[clients]`; clients [R] are distinct."""
        self._values.index_add_(0, clients, clipped.values)
        self.dropped.index_add_(0, clients, clipped.dropped)

    def take(self, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        """The sums of distinct clients [R, D], each with σ times its sensitivity of its own standard normal noise [D].

        The sums are empty afterwards: none is released twice.

        Raises:
            KeyError: no noise was given for a client that asked for some.
        """
        index = torch.tensor(clients, device=self._values.device)
        noised = self._values[index]
        for row, client in zip(noised, clients, strict=True):
            if sigma := self._deviations[client]:
                row.add_(noises[client], alpha=sigma)
        self._values[index] = 0.0
        return noised


def deviation(bounds: Sequence[float], noise_multiplier: float) -> float:
    """Standard deviation of the noise that hides one example: σ times the sensitivity, the L2 norm of the bounds.

    Raises:
        ValueError: a bound is negative, NaN or too small, or no noise could hide the sum.
    """
    if not all(bound == 0 or bound >= _SMALLEST for bound in bounds):
        raise ValueError(f"clip={min(bounds)}: must be 0, or {_SMALLEST:g} or more")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier={noise_multiplier}: must be 0 or more")
    sensitivity = math.hypot(*bounds)
    if math.isinf(sensitivity) and noise_multiplier:
        raise ValueError("an unbounded sum can't be noised: clip it to a finite norm")
    return noise_multiplier * sensitivity if noise_multiplier else 0.0


def even_bounds(clip: float, parts: Sequence[bool]) -> list[float]:
    """Bounds of parts that together make `clip`: C / √L for each of the L parts that an adapter has, 0 for others."""
    return [clip / math.sqrt(sum(parts)) if present else 0.0 for present in parts]
