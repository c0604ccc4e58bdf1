"""Estimates of the signal-to-noise ratio of a noised mean.

Both estimates are functions of values that are already noised, so they cost nothing (post-processing). The exact norm
of a mean before its noise would be another release, without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def signal_to_noise(mean: Tensor, noise_stddev: float) -> float:
    """Estimate √(‖x̃‖² − D s²)₊ / (s √D) for x̃ = x + N(0, s² I_D).

    The square is an unbiased estimate where it is not truncated at 0. Below about (2/D)^¼ it can't be distinguished
    from 0.

    Args:
        mean: noised mean x̃ [D].
        noise_stddev: s.
    """
    noise = noise_stddev * math.sqrt(mean.numel())
    return math.sqrt(max(0.0, float(mean.double().square().sum()) - noise**2)) / noise


def signal_to_spread(updates: Iterable[Tensor]) -> float | None:
    """Estimate the same ratio for the mean of K updates that were noised separately, by noise of unknown size.

    If an optimizer normalizes its gradients, the noise of an update is not known from the noise of DP-SGD. The spread
    of the updates is used instead: √(‖ū‖² − s²/K)₊ / √(s²/K) with s² = Σ‖u_k − ū‖² / (K − 1). It also contains
    differences between people's updates, so the estimate is low.

    Args:
        updates: noised updates u_k [D] each.

    Returns:
        The estimate. None for fewer than two updates, or if they are nearly equal.
    """
    total, squares, count = torch.zeros(()), 0.0, 0
    for update in updates:
        values = update.double()
        total, squares, count = total + values, squares + float(values.square().sum()), count + 1
    if count < 2:
        return None
    mean_energy = float(total.square().sum()) / count  # K ‖ū‖²
    mean_variance = (squares - mean_energy) / (count - 1) / count
    return (
        math.sqrt(max(0.0, mean_energy / count - mean_variance) / mean_variance)
        if mean_variance > 1e-12 * mean_energy
        else None
    )
