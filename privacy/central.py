"""Device-level privacy: every device's update is clipped, and their sum is noised once a round.

McMahan et al. (2018, arXiv:1710.06963), algorithm 1, with the estimator whose denominator is fixed (f̃_f); and, where
the clip follows a quantile, Andrew et al. (2021, arXiv:1905.03871), algorithm 1. The unit is all that one device sends
in a round, so a promise to a person who owns one device holds for everything on it.

Sensitivity: in `clip_and_sum`, C for the sum and ½ for the centred count. Noise: in `GaussianMechanism.release`. Sampling, which
decides what this adds up to over rounds: `strategies.selection`.
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
from privacy.noise import NoiseSource
from privacy.sensitivity import MAX_NOISE_MULTIPLIER, RESOLUTION, BoundedVectorSum, Sensitivity
from privacy.snr import signal_to_noise

MIN_CLIP, MAX_CLIP = 1e-12, 1e12
"""A clip lies between, wherever it adapts to."""

_WITHIN = 1 - 2.0**-24
"""What norms are scaled to, in C: more than the rounding of a norm of 2²⁸ numbers in float64 can make up for, whatever
the order of summation (2²⁸ · 2⁻⁵⁴ of the norm at most), and of what is computed of it."""


class ClippedUpdates(NamedTuple):
    """What a round's updates come to."""

    total: BoundedVectorSum
    """Σ clip(u_k), [D]; of sensitivity C."""
    below: BoundedVectorSum
    """Σ (b_k − ½), [1], b_k = 1 where ‖u_k‖ ≤ C and 0 elsewhere; of sensitivity ½."""
    dropped: int
    """Updates whose norm is not finite; they count as if their devices had not been there."""


def clip_and_sum(updates: Iterable[Tensor], clip: float, size: int) -> ClippedUpdates:
    """Σ u_k · min(1, C / ‖u_k‖), each with the weight 1, norms in float64.

    Formal guarantee: adding or removing one update, whatever it holds, moves `total` by at most C and `below` by at
    most ½. It is exact, as sums of floating point numbers are not (Casacuberta et al., 2022, arXiv:2207.10635): clipped
    updates are cut to whole steps of C / `RESOLUTION`, which add up without rounding and in any order.

    Args:
        updates: [D] each.
        clip: C, from `LEAST` to `MOST`.
        size: D.
    """
    if not MIN_CLIP <= clip <= MAX_CLIP:
        raise ValueError(f"{clip=}: must be {MIN_CLIP:g} to {MAX_CLIP:g}")
    total = torch.zeros(size, dtype=torch.int64)
    below, dropped = 0, 0
    for update in updates:
        values = update.double()
        norm = float(torch.linalg.vector_norm(values))
        if not math.isfinite(norm):  # min(1, C / NaN) is 1: it would pass whole
            dropped += 1
            continue
        below += 1 if norm <= clip else -1
        scale = _WITHIN * min(1.0, clip / norm if norm else 1.0)
        total += (values * scale / clip * RESOLUTION).long()  # towards zero, so that no norm grows
    return ClippedUpdates(
        BoundedVectorSum(total, Sensitivity(norm=clip, unit=DEVICE)),
        BoundedVectorSum(torch.tensor([below * RESOLUTION]), Sensitivity(norm=0.5, unit=DEVICE)),
        dropped,
    )


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """A clip that follows a quantile of the updates' norms."""

    quantile: float
    """γ: the share of updates that is to lie below the clip."""
    rate: float
    """η_C: how fast it follows, as a power of e."""
    noise_stddev: float
    """σ_b: of the noise on the count of updates below the clip."""

    def noise_multiplier(self, z: float) -> float:
        """z_Δ = (z⁻² − (2σ_b)⁻²)^(−½): with it the sum and the count together cost what z alone would (theorem 1).

        Raises:
            AntherError: the count alone costs more than z allows: z ≥ 2σ_b.
        """
        of_count = 2 * self.noise_stddev
        if z >= of_count:
            raise AntherError(
                f"privacy.device.target_quantile={self.quantile:g}: too few devices to adapt the clip: the noise multiplier "
                f"{z:.3g} must be under {of_count:.3g}, a tenth of the devices expected in a round; ask more devices, "
                "allow a larger privacy.device.epsilon, or set privacy.device.target_quantile=null"
            )
        return float((z**-2 - of_count**-2) ** -0.5)

    def next(self, clip: float, below: float) -> float:
        """C · exp(−η_C (b̃ − γ)), where b̃ is the noised share of updates below the clip."""
        step = min(max(self.rate * (self.quantile - below), -100.0), 100.0)  # of which e to the power is a number
        return min(max(clip * math.exp(step), MIN_CLIP), MAX_CLIP)


@dataclass(frozen=True, eq=False)
class NoisedMean:
    """One round's noised mean, and what may be told beside it at no further cost."""

    mean: Tensor
    """[D], float64."""
    noise_stddev: float
    """Standard deviation of the noise on each of its numbers."""
    snr: float
    """Signal to noise, estimated from the noised mean (`privacy.snr`)."""
    next_clip: float
    """C of the next round: the same, or the adapted one."""


@dataclass(frozen=True, kw_only=True)
class GaussianMechanism:
    """The Gaussian mechanism on a round's updates.

    Raises:
        ValueError: a value outside its range.
        AntherError: too few devices are expected to adapt the clip, or so much noise that integers don't hold it.
    """

    noise_multiplier: float
    """z: what the whole round costs, its count for the clip included."""
    expected: float
    """m: devices expected in a round, a public constant. Dividing by the number of replies would tell of it, and a mean
    over fewer has a higher sensitivity."""
    adaptive: AdaptiveClip | None = None

    def __post_init__(self) -> None:
        if not 0 < self.expected < math.inf:
            raise ValueError(f"expected={self.expected}: must be a number over 0")
        if (of_sum := self._of_sum) > MAX_NOISE_MULTIPLIER:
            raise AntherError(f"noise multiplier {of_sum:.3g}: over {MAX_NOISE_MULTIPLIER:g}, allow a larger epsilon")

    @property
    def _of_sum(self) -> float:
        """Noise multiplier of the sum: all of z, or what the count for the clip leaves of it."""
        z = self.noise_multiplier
        return self.adaptive.noise_multiplier(z) if self.adaptive else z

    def release(self, clipped: ClippedUpdates, noise: NoiseSource) -> NoisedMean:
        """(Σ clip(u_k) + N(0, (zC)² I)) / m, and with an adaptive clip the noised count; also if no device replied."""
        clip, of_sum = clipped.total.sensitivity.norm, self._of_sum
        mean = clipped.total.add_noise(of_sum, noise) / self.expected
        noise_stddev = clipped.total.sensitivity.noise_stddev(of_sum) / self.expected
        next_clip = clip
        if self.adaptive:
            count = clipped.below.add_noise(2 * self.adaptive.noise_stddev, noise)  # ½ · 2σ_b = σ_b
            next_clip = self.adaptive.next(clip, 0.5 + float(count) / self.expected)
        return NoisedMean(mean, noise_stddev, signal_to_noise(mean, noise_stddev), next_clip)
