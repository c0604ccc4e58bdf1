"""Per-example clipping whose result carries its own guarantee.

Abadi et al. (2016, arXiv:1607.00133), algorithm 1: g ← g · min(1, C / ‖g‖₂), summed over the examples of a batch. Each
clipped gradient is cut towards zero to whole steps of C / `RESOLUTION`, and their noise is whole steps too. The bound
stays with the sums, and the noise is derived from it, so that neither can be meant for another:

    sums = BoundedSums(clients, segments, like=rows, private=True)
    sums.open(client, bounds, noise_multiplier)
    sums.add(clients, sums.clip(clients, gradients, counts))  # for each micro-batch
    noise = source.rounded_gaussian(size, sums.stddev(client))
    noised = sums.take(clients, noises)  # the sums + N(0, (σC)²), rounded to a step, and empty again
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE
from privacy.sensitivity import MAX_NOISE_MULTIPLIER, RESOLUTION

_CHUNK = 32  # numbers whose squares are added in float32 before float64 takes over
_WITHIN = 1 - 2.0**-18
"""What norms are scaled to, in their bounds: makes up for all rounding, see `clip_and_sum`."""
_SMALLEST = 1e-12  # a bound under it would be lost among squares that float32 can't hold
_AT_ONCE = 1 << 22  # numbers that are copied in float64 at once


class ClippedGradients(NamedTuple):
    """Sums [R, D] of clipped gradients, one for each owner, and how many gradients of each [R] were not finite."""

    values: Tensor
    """With steps float64, each a whole number of its owner's steps; without, of the gradients' type."""
    dropped: Tensor


def clip_and_sum(
    gradients: Tensor, counts: Tensor, bounds: Tensor, segments: Sequence[int], steps: Tensor | None = None
) -> ClippedGradients:
    """Scale every part of every gradient to its owner's bound, cut it to whole steps, and sum those of each owner.

    It is done in place. A gradient whose norm is not finite counts as zero: a NaN survives min(1, C / NaN) and would
    carry an unbounded row past the clip.

    Formal guarantee, with steps: adding or removing one row of `gradients` changes the sum of its owner by at most the
    L2 norm of the owner's bounds, exactly and whatever the row holds, and no other sum at all.

    Proof. Let n be the norm of a part as `_norm` computes it. Squares of float32 numbers are added in float32 in groups
    of 32, in any order, so that each group's norm is at least 1 − 17·2⁻²⁴ of the true one, but for squares under 2⁻¹²⁶
    that may count as zero: in 2²⁸ numbers less than 2⁻⁹⁸ of squares, less than 2⁻¹⁹ of a bound (10⁻¹² or more) or of n
    where that is larger. So ‖g‖ ≤ max(n, bound) (1 + 2⁻¹⁹·⁸ + 2⁻¹⁹), and the scale, its conversion to float32 and each
    product add 2⁻²⁴ apiece. `_WITHIN` is less than all of that takes. A scale that float32 can't hold exactly is so
    small that every product is under one step. Cutting towards zero lets no number grow. Sums of integers under 2⁵³ are
    exact in float64.

    Args:
        gradients: [N, D], one for each example, those of one owner side by side; float32 or float64.
        counts: [R], how many each of the owners has.
        bounds: [R, L], C ≥ 0 of each part: 0 gives zeros, ∞ changes no finite gradient.
        segments: widths of the L parts of a gradient, which sum to D; one part is flat clipping.
        steps: [R], the value of a step for each owner; None for gradients without privacy, which are not cut.
    """
    if gradients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gradients in {gradients.dtype}: clip them in float32")
    owner_bounds = bounds.repeat_interleave(counts, dim=0, output_size=len(gradients))
    parts = gradients.split(list(segments), dim=1)
    norms = torch.stack([_norm(part) for part in parts], dim=1)
    finite = (norms < torch.finfo(gradients.dtype).max ** 0.5).all(1, keepdim=True)  # of less, C / norm is exact enough
    scales = (owner_bounds / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    if steps is not None:
        scales = scales * (_WITHIN / steps).repeat_interleave(counts, output_size=len(gradients))[:, None]
    scales = torch.where(finite, scales, 0.0).to(gradients.dtype)
    gradients.nan_to_num_(0.0, 0.0, 0.0)  # 0 · NaN would be NaN
    for part, scale in zip(parts, scales.T, strict=True):
        part.mul_(scale[:, None])
    dropped = sum_segments((~finite[:, 0]).to(gradients), counts)
    if steps is None:
        return ClippedGradients(sum_segments(gradients, counts), dropped)
    gradients.trunc_()
    columns = max(1, _AT_ONCE // max(1, len(gradients)))
    sums = [sum_segments(part.double(), counts) for part in gradients.split(columns, dim=1)]
    return ClippedGradients(torch.cat(sums, dim=1), dropped)


def sum_segments(values: Tensor, counts: Tensor) -> Tensor:
    """Sums over the first axis of `counts` [R] neighbours each, which add up to its length: always in one order."""
    return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True)  # checks would wait for the device


def _norm(rows: Tensor) -> Tensor:
    """L2 norms [N] of rows [N, d], float64: long sums in float32 would lose digits, a copy in float64 takes longer."""
    whole = rows.shape[1] // _CHUNK * _CHUNK
    norms = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _CHUNK)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    return torch.cat([norms, rest], dim=1).double().square().sum(1).sqrt()


class BoundedGradientSums:
    """Sums of clipped gradients, a row [D] for each client, gathered over the micro-batches of its logical batch.

    Formal guarantee of private sums: adding or removing one example changes the sum of its client by at most the L2
    norm of its `bounds`, whatever the other examples are, and the noise is the client's σ times that norm. Sums and
    noise are whole steps of that norm / `RESOLUTION`, so that each whole step is a possible release whatever the
    examples are.

    Args:
        private: whether the clients are private; if not, none is clipped, cut or noised.

    Attributes:
        bounds: [S, L], what each part of an example's gradient is clipped to; ∞ for a client without privacy.
        dropped: [S], examples whose gradient was not finite, since the client was opened.
    """

    relation = ADD_OR_REMOVE_ONE

    def __init__(self, clients: int, segments: Sequence[int], *, like: Tensor, private: bool) -> None:
        self._like, self._segments = like, segments
        self._values = like.new_zeros(clients, sum(segments), dtype=torch.float64 if private else like.dtype)
        self._steps = like.new_ones(clients, dtype=torch.float64) if private else None
        self._stddevs = [0.0] * clients
        self.bounds = like.new_full((clients, len(segments)), math.inf, dtype=torch.float64)
        self.dropped = like.new_zeros(clients)

    def reset(
        self, clients: Sequence[int], bounds: Sequence[Sequence[float]], noise_multipliers: Sequence[float]
    ) -> None:
        """Begin anew for these clients [R], each with the bounds [L] of its clip and its σ; 0 asks for no noise.

        Raises:
            ValueError: a bound is negative, NaN or too small, or no noise could hide the sum.
        """
        if self._steps is None and any(noise_multipliers):
            raise ValueError("noise on sums that are not private")
        steps = []
        for client, parts, sigma in zip(clients, bounds, noise_multipliers, strict=True):
            self._stddevs[client] = stddev(parts, sigma)
            steps.append(math.hypot(*parts) / RESOLUTION or 1.0)  # no bound at all: there are zeros alone
        index = torch.tensor(clients, device=self._values.device)
        self._values[index] = 0.0
        self.dropped[index] = 0.0
        self.bounds[index] = torch.tensor(bounds, dtype=torch.float64).to(self.bounds)
        if self._steps is not None:
            if math.inf in steps:
                raise ValueError("a private sum needs a finite bound")
            self._steps[index] = torch.tensor(steps, dtype=torch.float64).to(self._steps)

    def clip(self, clients: Tensor, gradients: Tensor, counts: Tensor) -> ClippedGradients:
        """`clip_and_sum` of gradients [N, D], of which each of the clients [R] has `counts` [R], to their bounds."""
        steps = None if self._steps is None else self._steps[clients]
        return clip_and_sum(gradients, counts, self.bounds[clients], self._segments, steps)

    def add(self, clients: Tensor, clipped: ClippedGradients) -> None:
        """Add what `clip` made for these clients [R], which are distinct."""
        self._values.index_add_(0, clients, clipped.values)
        self.dropped.index_add_(0, clients, clipped.dropped)

    def stddev(self, client: int) -> float:
        """Standard deviation of a client's noise, in steps: σ times its sensitivity. 0: none is asked for."""
        return self._stddevs[client]

    def pop_noised(self, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        """The sums of distinct clients [R, D], each with its own noise [D]: whole steps, of the client's `stddev`.

        A private release is a function of the noised integers alone. The sums are empty afterwards: none is released
        twice.

        Raises:
            KeyError: no noise was given for a client that asked for some.
        """
        index = torch.tensor(clients, device=self._values.device)
        noised = self._values[index]
        for row, client in zip(noised, clients, strict=True):
            if self._stddevs[client]:
                row.add_(noises[client])
        self._values[index] = 0.0
        if self._steps is not None:
            noised.mul_(self._steps[index, None])
        return noised.to(self._like)


def stddev(bounds: Sequence[float], noise_multiplier: float) -> float:
    """Standard deviation, in steps, of the noise that hides one example: σ times the sensitivity, the L2 norm of the
    bounds, which is `RESOLUTION` steps. 0: there is nothing to hide, or σ is 0.

    Raises:
        ValueError: a bound is negative, NaN or too small, or no noise could hide the sum.
    """
    if not all(bound == 0 or bound >= _SMALLEST for bound in bounds):
        raise ValueError(f"clip={min(bounds)}: must be 0, or {_SMALLEST:g} or more")
    if not 0 <= noise_multiplier <= MAX_NOISE_MULTIPLIER:
        raise ValueError(f"noise_multiplier={noise_multiplier}: must be 0 to {MAX_NOISE_MULTIPLIER:g}")
    if math.inf in bounds and noise_multiplier:
        raise ValueError("an unbounded sum can't be noised: clip it to a finite norm")
    return noise_multiplier * RESOLUTION if any(bounds) else 0.0


def even_bounds(clip: float, parts: Sequence[bool]) -> list[float]:
    """Bounds of parts that together make `clip`: C / √L for each of the L parts that an adapter has, 0 for others."""
    return [clip / math.sqrt(sum(parts)) if present else 0.0 for present in parts]
