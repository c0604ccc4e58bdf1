"""Device-level privacy: the updates of a round are clipped, and their sum is noised once.

Implements algorithm 1 of McMahan et al. (2018, arXiv:1710.06963) with the fixed-denominator estimator f̃_f and, for a
clip that follows a quantile, algorithm 1 of Andrew et al. (2021, arXiv:1905.03871). The unit is everything that one
device sends in a round, so a guarantee to a person who owns one device covers all data on it.

Sensitivity: `clip_and_sum`, C for the sum and ½ for the centered count. Noise: `GaussianMechanism.release`. Sampling,
which determines the composition over rounds: `strategies.selection`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import AntherError
from privacy.accounting import DEVICE
from privacy.bounded_sum import MAX_NOISE_MULTIPLIER, RESOLUTION, BoundedSum, Sensitivity
from privacy.noise import NoiseSource
from privacy.snr import signal_to_noise

MIN_CLIP, MAX_CLIP = 1e-12, 1e12
"""Range of the clip C, also of an adaptive one."""

_SAFETY_FACTOR = 1 - 2.0**-24
"""Norms are scaled to this fraction of C. The margin exceeds the rounding errors of a float64 norm of 2²⁸ numbers in
any order of summation (2²⁸ · 2⁻⁵⁴ of the norm at most), and of the values computed from it.
"""


class ClippedUpdates(NamedTuple):
    """Sums over the clipped updates of a round."""

    total: BoundedSum
    """Σ clip(u_k) [D], of sensitivity C."""
    below: BoundedSum
    """Σ (b_k − ½) [1], with b_k = 1 if ‖u_k‖ ≤ C and 0 otherwise, of sensitivity ½."""
    dropped: int
    """Number of updates with a non-finite norm. They count as if their devices had not taken part."""


def clip_and_sum(updates: Iterable[Tensor], clip: float, size: int) -> ClippedUpdates:
    """Compute Σ u_k · min(1, C / ‖u_k‖) with weight 1 for every update and norms in float64.

    Formal guarantee: adding or removing any one update changes `total` by at most C and `below` by at most ½ in L2
    norm. This is exact, unlike for floating point sums (Casacuberta et al., 2022, arXiv:2207.10635):
    clipped updates are truncated to whole steps of C / `RESOLUTION`, which add up without rounding in any order.

    Args:
        updates: updates u_k [D].
        clip: C, from `MIN_CLIP` to `MAX_CLIP`.
        size: D.

    Returns:
        Bounded sums, not yet noised, and the number of dropped updates.

    Raises:
        ValueError: `clip` is out of range.
    """
    if not MIN_CLIP <= clip <= MAX_CLIP:
        raise ValueError(f"{clip=}: must be {MIN_CLIP:g} to {MAX_CLIP:g}")
    total = torch.zeros(size, dtype=torch.int64)
    below, dropped = 0, 0
    for update in updates:
        values = update.double()
        norm = float(torch.linalg.vector_norm(values))
        if not math.isfinite(norm):  # min(1, C / NaN) is 1, so the update would not be clipped
            dropped += 1
            continue
        below += 1 if norm <= clip else -1
        scale = _SAFETY_FACTOR * min(1.0, clip / norm if norm else 1.0)
        total += (values * scale / clip * RESOLUTION).long()  # towards zero, so that no norm grows
    return ClippedUpdates(
        BoundedSum(total, Sensitivity(norm=clip, unit=DEVICE)),
        BoundedSum(torch.tensor([below * RESOLUTION]), Sensitivity(norm=0.5, unit=DEVICE)),
        dropped,
    )


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Clip that follows a quantile of the updates' norms (Andrew et al., 2021)."""

    quantile: float
    """γ: target share of updates with a norm below the clip."""
    rate: float
    """η_C: learning rate of the geometric update."""
    noise_stddev: float
    """σ_b: standard deviation of the noise on the count of updates below the clip."""

    def noise_multiplier(self, z: float) -> float:
        """Compute the noise multiplier of the sum, z_Δ = (z⁻² − (2σ_b)⁻²)^(−½).

        With it, sum and count together cost as much as a single release with z (theorem 1).

        Raises:
            AntherError: the count by itself costs more than z allows: z ≥ 2σ_b.
        """
        count_multiplier = 2 * self.noise_stddev
        if z >= count_multiplier:
            raise AntherError(
                f"privacy.device.target_quantile={self.quantile:g}: too few devices to adapt the clip: the noise "
                f"multiplier {z:.3g} must be under {count_multiplier:.3g}, a tenth of the devices expected in a round; "
                "ask more devices, allow a larger privacy.device.epsilon, or set privacy.device.target_quantile=null"
            )
        return float((z**-2 - count_multiplier**-2) ** -0.5)

    def next(self, clip: float, below: float) -> float:
        """Return the next clip, C · exp(−η_C (b̃ − γ)), where b̃ is the noised share of updates below the clip."""
        step = min(max(self.rate * (self.quantile - below), -100.0), 100.0)  # so that exp neither overflows nor is 0
        return min(max(clip * math.exp(step), MIN_CLIP), MAX_CLIP)


@dataclass(frozen=True, eq=False)
class NoisedMean:
    """Noised mean of one round, and values that follow from it by post-processing."""

    mean: Tensor
    """[D], float64."""
    noise_stddev: float
    """Standard deviation of the noise on each number of `mean`."""
    snr: float
    """Signal-to-noise ratio, estimated from the noised mean (`privacy.snr`)."""
    next_clip: float
    """C of the next round."""


@dataclass(frozen=True, kw_only=True)
class GaussianMechanism:
    """Gaussian mechanism on the updates of a round.

    Raises:
        ValueError: a value is out of range.
        AntherError: too few devices are expected for an adaptive clip, or the noise is too large for exact integers.
    """

    noise_multiplier: float
    """z: cost of the whole round, including the count for an adaptive clip."""
    expected: float
    """m: number of devices expected in a round, a public constant. Dividing by the number of replies would reveal it,
    and a mean over fewer updates has a higher sensitivity."""
    adaptive: AdaptiveClip | None = None

    def __post_init__(self) -> None:
        if not 0 < self.expected < math.inf:
            raise ValueError(f"expected={self.expected}: must be positive and finite")
        if (sum_multiplier := self._sum_multiplier) > MAX_NOISE_MULTIPLIER:
            raise AntherError(
                f"noise multiplier {sum_multiplier:.3g}: over {MAX_NOISE_MULTIPLIER:g}; allow a larger epsilon"
            )

    @property
    def _sum_multiplier(self) -> float:
        """Noise multiplier of the sum: z, or the remainder of z after the count for an adaptive clip."""
        z = self.noise_multiplier
        return self.adaptive.noise_multiplier(z) if self.adaptive else z

    def release(self, clipped: ClippedUpdates, noise: NoiseSource) -> NoisedMean:
        """Release (Σ clip(u_k) + N(0, (zC)² I)) / m, and the noised count for an adaptive clip, even without replies.

        Args:
            clipped: sums over the round's updates.
            noise: source of the noise.
        """
        clip, sum_multiplier = clipped.total.sensitivity.norm, self._sum_multiplier
        mean = clipped.total.add_noise(sum_multiplier, noise) / self.expected
        noise_stddev = clipped.total.sensitivity.noise_stddev(sum_multiplier) / self.expected
        next_clip = clip
        if self.adaptive:
            count = clipped.below.add_noise(2 * self.adaptive.noise_stddev, noise)  # ½ · 2σ_b = σ_b
            next_clip = self.adaptive.next(clip, 0.5 + float(count) / self.expected)
        return NoisedMean(mean, noise_stddev, signal_to_noise(mean, noise_stddev), next_clip)
