"""Per-example clipping, with sums that carry their sensitivity.

Implements algorithm 1 of Abadi et al. (2016, arXiv:1607.00133): g ← g · min(1, C / ‖g‖₂), summed over the examples of
a batch. Each clipped gradient is truncated towards zero to whole steps of C / `RESOLUTION`, and the noise is a whole
number of steps too. The sums store their bound, and the noise is derived from it, so that the two can't disagree:

    sums = BoundedGradientSums(clients, segments, like=buffer, private=True)
    sums.reset(clients, bounds, noise_multipliers)
    sums.add(clients, sums.clip(clients, gradients, counts))  # for each microbatch
    noise = source.rounded_gaussian(size, sums.stddev(client))
    noised = sums.pop_noised(clients, noises)  # sums + N(0, (σC)²), rounded to a step; the sums are then zero
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from privacy.accounting import ADD_OR_REMOVE_ONE
from privacy.sensitivity import MAX_NOISE_MULTIPLIER, RESOLUTION

_CHUNK = 32  # numbers whose squares are summed in float32; sums of several chunks are float64
_SAFETY_FACTOR = 1 - 2.0**-18
"""Norms are scaled to this fraction of their bounds. It covers all rounding errors, see `clip_and_sum`."""
_MIN_BOUND = 1e-12  # smaller bounds would vanish among squares that float32 can't represent
_MAX_COPIED = 1 << 22  # numbers that are copied to float64 at a time


class ClippedGradients(NamedTuple):
    """Sums of clipped gradients, one for each owner."""

    values: Tensor
    """Sums [R, D]. With steps: float64, each a whole number of its owner's steps. Without: the gradients' dtype."""
    dropped: Tensor
    """Number of non-finite gradients of each owner [R]."""


def clip_and_sum(
    gradients: Tensor, counts: Tensor, bounds: Tensor, segments: Sequence[int], steps: Tensor | None = None
) -> ClippedGradients:
    """Clip each part of each gradient to its owner's bound, truncate it to whole steps, and sum the gradients by owner.

    `gradients` are overwritten. A gradient whose norm is not finite counts as zero: a NaN survives min(1, C / NaN) and
    would carry an unbounded row past the clip.

    Formal guarantee (with steps): adding or removing one row of `gradients` changes its owner's sum by at most the L2
    norm of the owner's bounds, exactly and for any row, and does not change the other sums.

    Proof. Let n be the norm of a part as `_norm` computes it. Squares of float32 numbers are added in float32 in groups
    of 32, in any order, so each group's norm is at least 1 − 17·2⁻²⁴ of the true one, except for squares under 2⁻¹²⁶,
    which may count as zero: in 2²⁸ numbers less than 2⁻⁹⁸ of squares, less than 2⁻¹⁹ of a bound (10⁻¹² or more) or of n
    where that is larger. So ‖g‖ ≤ max(n, bound) (1 + 2⁻¹⁹·⁸ + 2⁻¹⁹), and the scale, its conversion to float32 and each
    product add 2⁻²⁴ each. `_SAFETY_FACTOR` compensates for all of these errors together. A scale that float32 can't
    represent exactly is so small that every product is under one step. Truncation towards zero never increases a
    number. Sums of integers under 2⁵³ are exact in float64.

    Args:
        gradients: [N, D], one for each example, grouped by owner; float32 or float64. Overwritten.
        counts: [R], number of gradients of each owner.
        bounds: [R, L], clipping norm C ≥ 0 of each part. 0 gives zeros; ∞ leaves finite gradients unchanged.
        segments: widths of the L parts of a gradient, which sum to D. One part is flat clipping.
        steps: [R], value of a step for each owner. None for non-private gradients, which are not truncated.

    Returns:
        Sums [R, D] and the number of non-finite gradients [R].

    Raises:
        TypeError: the gradients are neither float32 nor float64.
    """
    if gradients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gradients in {gradients.dtype}: clip them in float32")
    owner_bounds = bounds.repeat_interleave(counts, dim=0, output_size=len(gradients))
    parts = gradients.split(list(segments), dim=1)
    norms = torch.stack([_norm(part) for part in parts], dim=1)
    finite = (norms < torch.finfo(gradients.dtype).max ** 0.5).all(1, keepdim=True)  # below it, C / norm is accurate
    scales = (owner_bounds / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    if steps is not None:
        scales = scales * (_SAFETY_FACTOR / steps).repeat_interleave(counts, output_size=len(gradients))[:, None]
    scales = torch.where(finite, scales, 0.0).to(gradients.dtype)
    gradients.nan_to_num_(0.0, 0.0, 0.0)  # 0 · NaN would be NaN
    for part, scale in zip(parts, scales.T, strict=True):
        part.mul_(scale[:, None])
    dropped = sum_segments((~finite[:, 0]).to(gradients), counts)
    if steps is None:
        return ClippedGradients(sum_segments(gradients, counts), dropped)
    gradients.trunc_()
    columns = max(1, _MAX_COPIED // max(1, len(gradients)))
    sums = [sum_segments(part.double(), counts) for part in gradients.split(columns, dim=1)]
    return ClippedGradients(torch.cat(sums, dim=1), dropped)


def sum_segments(values: Tensor, counts: Tensor) -> Tensor:
    """Sum groups of `counts` [R] consecutive entries of the first axis, always in the same order."""
    return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True)  # checks would synchronize


def _norm(rows: Tensor) -> Tensor:
    """Compute L2 norms [N] of rows [N, d], float64.

    Long float32 sums would lose digits, and a float64 copy of the rows would take longer.
    """
    chunked = rows.shape[1] // _CHUNK * _CHUNK
    chunk_norms = torch.linalg.vector_norm(rows[:, :chunked].unflatten(1, (-1, _CHUNK)), dim=2)
    tail_norm = torch.linalg.vector_norm(rows[:, chunked:], dim=1, keepdim=True)
    return torch.cat([chunk_norms, tail_norm], dim=1).double().square().sum(1).sqrt()


class BoundedGradientSums:
    """Sums [S, D] of clipped gradients, one row for each client, over the microbatches of its logical batch.

    Formal guarantee of private sums: for any other examples, adding or removing one example changes its client's sum by
    at most the L2 norm of the client's `bounds`, and the noise is the client's σ times that norm. Sums and noise are
    whole steps of that norm / `RESOLUTION`, so that for any examples, every whole number of steps is a possible
    release.

    Args:
        clients: number of rows S.
        segments: widths of the L parts of a gradient, which sum to D.
        like: tensor with the device and dtype of the gradients.
        private: whether the clients are private. If not, gradients are neither clipped, truncated nor noised.

    Attributes:
        bounds: [S, L], clipping norm of each part of an example's gradient; ∞ for non-private clients.
        dropped: [S], number of examples with a non-finite gradient since the client's last `reset`.
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
        """Set the sums of clients to zero, and set their bounds and noise.

        Args:
            clients: rows of the clients [R].
            bounds: clipping norms [R, L].
            noise_multipliers: σ of each client [R]; 0 for no noise.

        Raises:
            ValueError: a bound is negative, NaN or too small, or the sum can't be noised.
        """
        if self._steps is None and any(noise_multipliers):
            raise ValueError("noise on sums that are not private")
        steps = []
        for client, parts, sigma in zip(clients, bounds, noise_multipliers, strict=True):
            self._stddevs[client] = stddev(parts, sigma)
            steps.append(math.hypot(*parts) / RESOLUTION or 1.0)  # all bounds 0: every gradient becomes zero
        index = torch.tensor(clients, device=self._values.device)
        self._values[index] = 0.0
        self.dropped[index] = 0.0
        self.bounds[index] = torch.tensor(bounds, dtype=torch.float64).to(self.bounds)
        if self._steps is not None:
            if math.inf in steps:
                raise ValueError("a private sum needs a finite bound")
            self._steps[index] = torch.tensor(steps, dtype=torch.float64).to(self._steps)

    def clip(self, clients: Tensor, gradients: Tensor, counts: Tensor) -> ClippedGradients:
        """Clip and sum gradients by client.

        Args:
            clients: rows of the clients [R].
            gradients: [N, D], grouped by client. Overwritten.
            counts: number of gradients of each client [R].

        Returns:
            The result of `clip_and_sum` under the clients' bounds and steps.
        """
        steps = None if self._steps is None else self._steps[clients]
        return clip_and_sum(gradients, counts, self.bounds[clients], self._segments, steps)

    def add(self, clients: Tensor, clipped: ClippedGradients) -> None:
        """Add a result of `clip` for distinct clients [R]."""
        self._values.index_add_(0, clients, clipped.values)
        self.dropped.index_add_(0, clients, clipped.dropped)

    def stddev(self, client: int) -> float:
        """Return the standard deviation of a client's noise, in steps: σ times its sensitivity; 0 without noise."""
        return self._stddevs[client]

    def pop_noised(self, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        """Return the noised sums of distinct clients, and set the sums to zero, so that none is released twice.

        A private release is a function of the noised integers only.

        Args:
            clients: rows of the clients [R].
            noises: noise [D] of each client with noise, in whole steps, with the client's `stddev`.

        Returns:
            Noised sums [R, D], in the gradients' dtype.

        Raises:
            KeyError: the noise of a client that has a `stddev` is missing.
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
    """Compute the standard deviation, in steps, of the noise that hides one example.

    It is σ times the sensitivity, the L2 norm of the bounds, which is `RESOLUTION` steps. It is 0 if σ is 0 or there is
    nothing to hide because all bounds are 0.

    Raises:
        ValueError: a bound is negative, NaN or too small, or the sum can't be noised.
    """
    if not all(bound == 0 or bound >= _MIN_BOUND for bound in bounds):
        raise ValueError(f"clip={min(bounds)}: must be 0, or {_MIN_BOUND:g} or more")
    if not 0 <= noise_multiplier <= MAX_NOISE_MULTIPLIER:
        raise ValueError(f"noise_multiplier={noise_multiplier}: must be 0 to {MAX_NOISE_MULTIPLIER:g}")
    if math.inf in bounds and noise_multiplier:
        raise ValueError("an unbounded sum can't be noised: clip it to a finite norm")
    return noise_multiplier * RESOLUTION if any(bounds) else 0.0


def even_bounds(clip: float, parts: Sequence[bool]) -> list[float]:
    """Return equal bounds with joint L2 norm `clip`: C / √L for each of the L present parts, 0 for the others."""
    return [clip / math.sqrt(sum(parts)) if present else 0.0 for present in parts]
