"""DP-SGD: sample a batch, clip each gradient, sum, add noise, normalize.

Implements algorithm 1 of Abadi et al. (2016, arXiv:1607.00133) on a grid of integers. One step on x_1, …, x_n,
with s = C / 2²⁰:

    B ← each i in 1 … n, independently with probability q    # poisson_sample; B may be empty
    for i in B:
        g ← ∇ loss(w, x_i)
        g_i ← trunc(g · min(1, C / ‖g‖₂) / s)                # clip; 0 if ‖g‖₂ is not finite
    S ← Σ g_i over B                                         # clip_and_sum, and BoundedSums.add over microbatches
    z ← round(N(0, (σ · 2²⁰)² I))                            # BoundedSum.draw_noise, also for an empty B
    y ← (S + z) · s                                          # BoundedSum.add, for all clients BoundedSums.pop_noised
    w ← optimizer(w, y / b)                                  # normalize; b is public, never |B|

*Sensitivity.* Adding or removing one x_i changes S · s by at most C in L2 norm, exactly and for any gradients (proof:
`clip`). *Sampling.* B is secret and drawn anew in each step, as amplification by sampling requires. *Noise.* Every step
is noised, and charged as one `accounting.PoissonGaussian` with σ and q, whatever B is. S and z are integers, so the set
of possible releases is the same for all data (`privacy.noise`). The optimizer and everything after it are
post-processing.

Noise is derived from a sum's own sensitivity, so that the two can't disagree (`privacy.bounded_sum`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from privacy.accounting import IMAGE
from privacy.bounded_sum import MAX_NOISE_MULTIPLIER, RESOLUTION, BoundedSum, Sensitivity, Support
from privacy.noise import NoiseSource

_CHUNK = 32  # numbers whose squares are summed in float32; sums of several chunks are float64
_SAFETY_FACTOR = 1 - 2.0**-18
"""Norms are scaled to this fraction of their bounds. It covers all rounding errors, see `clip`."""
_MIN_BOUND = 1e-12  # smaller bounds would vanish among squares that float32 can't represent
_MAX_COPIED = 1 << 22  # numbers that are copied to float64 at a time


def poisson_sample(size: int, rate: float, source: NoiseSource) -> Tensor:
    """Draw the members of one batch, each of range(size) independently with probability `rate`.

    The batch may be empty, and the step is then taken and charged like any other: skipping it would reveal the batch.

    Args:
        size: number of units.
        rate: sampling rate q in [0, 1].
        source: source of the secret draws.

    Returns:
        Indices of the members, int64 [members], ascending.
    """
    return source.poisson_batch(size, rate)


class ClippedGradients(NamedTuple):
    """Sums of clipped gradients, one for each owner."""

    values: Tensor
    """Sums [R, D]. With steps: float64, each a whole number of its owner's steps. Without: the gradients' dtype."""
    dropped: Tensor
    """Number of non-finite gradients of each owner [R]."""


def clip(
    gradients: Tensor, counts: Tensor, bounds: Tensor, segments: Sequence[int], steps: Tensor | None = None
) -> Tensor:
    """Clip each part of each gradient to its owner's bound, g ← g · min(1, C / ‖g‖₂), and truncate it to whole steps.

    `gradients` are overwritten. A gradient whose norm is not finite counts as zero: a NaN survives min(1, C / NaN) and
    would carry an unbounded row past the clip.

    Formal guarantee (with steps): each part of a row becomes a whole number of steps, with at most the bound as its L2
    norm, exactly and for any row. It is a function of that row only.

    Proof. Let n be the norm of a part as `_norm` computes it. Squares of float32 numbers are added in float32 in groups
    of 32, in any order, so each group's norm is at least 1 − 17·2⁻²⁴ of the true one, except for squares under 2⁻¹²⁶,
    which may count as zero: in 2²⁸ numbers less than 2⁻⁹⁸ of squares, less than 2⁻¹⁹ of a bound (10⁻¹² or more) or of n
    where that is larger. So ‖g‖ ≤ max(n, bound) (1 + 2⁻¹⁹·⁸ + 2⁻¹⁹), and the scale, its conversion to float32 and each
    product add 2⁻²⁴ each. `_SAFETY_FACTOR` compensates for all of these errors together. A scale that float32 can't
    represent exactly is so small that every product is under one step. Truncation towards zero never increases a
    number.

    Args:
        gradients: [N, D], one for each example, grouped by owner; float32 or float64. Overwritten.
        counts: [R], number of gradients of each owner.
        bounds: [R, L], clipping norm C ≥ 0 of each part. 0 gives zeros; ∞ leaves finite gradients unchanged.
        segments: widths of the L parts of a gradient, which sum to D. One part is flat clipping.
        steps: [R], value of a step for each owner. None for non-private gradients, which are not truncated.

    Returns:
        Whether each gradient is finite, bool [N].

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
    if steps is not None:
        gradients.trunc_()
    return finite[:, 0]


def clip_and_sum(
    gradients: Tensor, counts: Tensor, bounds: Tensor, segments: Sequence[int], steps: Tensor | None = None
) -> ClippedGradients:
    """Clip the gradients as `clip` does, and sum them by owner.

    Formal guarantee (with steps): adding or removing one row of `gradients` changes its owner's sum by at most the L2
    norm of the owner's bounds, exactly and for any row, and does not change the other sums. Proof: the sum changes by
    the clipped row, since sums of integers under 2⁵³ are exact in float64.

    Args:
        gradients: [N, D], one for each example, grouped by owner; float32 or float64. Overwritten.
        counts: [R], number of gradients of each owner.
        bounds: [R, L], clipping norm of each part.
        segments: widths of the L parts of a gradient, which sum to D.
        steps: [R], value of a step for each owner, or None.

    Returns:
        Sums [R, D] and the number of non-finite gradients [R].

    Raises:
        TypeError: the gradients are neither float32 nor float64.
    """
    finite = clip(gradients, counts, bounds, segments, steps)
    dropped = sum_segments((~finite).to(gradients), counts)
    if steps is None:
        return ClippedGradients(sum_segments(gradients, counts), dropped)
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


class BoundedSums:
    """Sums [S, D] of clipped gradients, one `BoundedSum` for each client, over the microbatches of its logical batch.

        sums = BoundedSums(clients, segments, like=buffer, private=True)
        sums.reset(clients, bounds, noise_multipliers)
        sums.add(clients, sums.clip(clients, gradients, counts))  # for each microbatch
        noises = {client: sums.draw_noise(client, source) for client in clients}
        noised = sums.pop_noised(clients, noises)  # sums + N(0, (σC)²), rounded to a step; the sums are then zero

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

    def __init__(self, clients: int, segments: Sequence[int], *, like: Tensor, private: bool) -> None:
        self._like, self._segments = like, segments
        self._values = like.new_zeros(clients, sum(segments), dtype=torch.float64 if private else like.dtype)
        self._steps = like.new_ones(clients, dtype=torch.float64) if private else None
        self._noise_multipliers = [0.0] * clients  # 0: nothing to hide
        self._norms = [math.inf] * clients  # L2 norms of the bounds
        self._supports: list[Support | None] = [None] * clients
        self.bounds = like.new_full((clients, len(segments)), math.inf, dtype=torch.float64)
        self.dropped = like.new_zeros(clients)

    def reset(
        self,
        clients: Sequence[int],
        bounds: Sequence[Sequence[float]],
        noise_multipliers: Sequence[float],
        supports: Sequence[Support | None] | None = None,
    ) -> None:
        """Set the sums of clients to zero, and set their bounds and noise.

        Args:
            clients: rows of the clients [R].
            bounds: clipping norms [R, L].
            noise_multipliers: σ of each client [R]; 0 for no noise.
            supports: numbers that a client's gradients have [R]. None: all have all.

        Raises:
            ValueError: a bound is negative, NaN or too small, or the sum can't be noised.
        """
        if self._steps is None and any(noise_multipliers):
            raise ValueError("noise on sums that are not private")
        supports = [None] * len(clients) if supports is None else supports
        for client, parts, sigma, support in zip(clients, bounds, noise_multipliers, supports, strict=True):
            check_bounds(parts, sigma)
            self._noise_multipliers[client] = sigma if any(parts) else 0.0  # all bounds 0: every gradient becomes zero
            self._norms[client] = math.hypot(*parts)
            self._supports[client] = support
        index = torch.tensor(clients, device=self._values.device)
        self._values[index] = 0.0
        self.dropped[index] = 0.0
        self.bounds[index] = torch.tensor(bounds, dtype=torch.float64).to(self.bounds)
        if self._steps is not None:
            steps = [self._norms[client] / RESOLUTION or 1.0 for client in clients]
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

    def draw_noise(self, client: int, source: NoiseSource | None) -> Tensor | None:
        """Draw the noise of a client's next release, with the client's σ and sensitivity.

        Args:
            client: row of the client.
            source: the client's own source; required if its σ is positive.

        Returns:
            Noise in whole steps, int64 [D], or None if σ is 0.

        Raises:
            ValueError: the source is missing, or failed.
        """
        if not self._noise_multipliers[client]:
            return None
        if source is None:
            raise ValueError("a private sum needs a noise source")
        return self._bounded(client, self._values[client]).draw_noise(self._noise_multipliers[client], source)

    def pop_noised(self, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        """Return the noised sums of distinct clients, and set the sums to zero, so that none is released twice.

        A private release is a function of the noised integers only.

        Args:
            clients: rows of the clients [R].
            noises: the result of `draw_noise` for each client with noise.

        Returns:
            Noised sums [R, D], in the gradients' dtype.

        Raises:
            KeyError: the noise of a client with a positive σ is missing.
        """
        index = torch.tensor(clients, device=self._values.device)
        noised = self._values[index]
        self._values[index] = 0.0
        if self._steps is None:
            return noised
        for row, client in zip(noised, clients, strict=True):
            if self._noise_multipliers[client]:
                row.copy_(self._bounded(client, row).add(noises[client]))
            else:
                row.mul_(self._steps[client])
        return noised.to(self._like)

    def _bounded(self, client: int, steps: Tensor) -> BoundedSum:
        """Return a client's sum with its sensitivity, the L2 norm of the client's bounds."""
        return BoundedSum(steps, Sensitivity(norm=self._norms[client], unit=IMAGE), support=self._supports[client])


def normalize(noised: Tensor, divisors: Tensor) -> Tensor:
    """Divide noised sums [R, D], in place, by public constants [R, 1].

    The divisor is the batch size that the plan expects, never the size of a Poisson batch or the number of replies: it
    would reveal that number, and a mean over fewer units has a higher sensitivity.
    """
    return noised.div_(divisors)


def check_bounds(bounds: Sequence[float], noise_multiplier: float) -> None:
    """Raise ValueError unless a sum with these bounds can hide one example with this noise multiplier.

    Args:
        bounds: clipping norm of each part of a gradient; 0 for parts that are absent.
        noise_multiplier: σ; 0 for no noise.
    """
    if not all(bound == 0 or bound >= _MIN_BOUND for bound in bounds):
        raise ValueError(f"clip={min(bounds)}: must be 0, or {_MIN_BOUND:g} or more")
    if not 0 <= noise_multiplier <= MAX_NOISE_MULTIPLIER:
        raise ValueError(f"noise_multiplier={noise_multiplier}: must be 0 to {MAX_NOISE_MULTIPLIER:g}")
    if math.inf in bounds and noise_multiplier:
        raise ValueError("an unbounded sum can't be noised: clip it to a finite norm")


def even_bounds(clip: float, parts: Sequence[bool]) -> list[float]:
    """Return equal bounds with joint L2 norm `clip`: C / √L for each of the L present parts, 0 for the others."""
    return [clip / math.sqrt(sum(parts)) if present else 0.0 for present in parts]
