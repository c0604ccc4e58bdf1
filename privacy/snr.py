"""How much of a noised mean is signal.

Both estimates are functions of what was noised already, and so cost nothing. The exact norm of a mean before its noise
would be a release of its own, without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def signal_to_noise(mean: Tensor, noise_stddev: float) -> float:
    """√(‖x̃‖² − D s²)₊ / (s √D) of x̃ = x + N(0, s² I_D).

    Its square is an unbiased estimate where it is not cut off at 0; below about (2/D)^¼ it can't be told from 0.
    """
    noise = noise_stddev * math.sqrt(mean.numel())
    return math.sqrt(max(0.0, float(mean.double().square().sum()) - noise**2)) / noise


def signal_to_spread(updates: Iterable[Tensor]) -> float | None:
    """The same of the mean of K updates that were noised one by one, by noise that nobody knows the size of.

    An optimiser that normalises its gradients stands between the noise of DP-SGD and an update. What the updates differ
    by takes its place: with s² = Σ‖u_k − ū‖² / (K − 1), √(‖ū‖² − s²/K)₊ / √(s²/K). That people differ counts as noise
    here, so it is a low estimate. None for fewer than two updates, or where they hardly differ.
    """
    total, squares, count = torch.zeros(()), 0.0, 0
    for update in updates:
        values = update.double()
        total, squares, count = total + values, squares + float(values.square().sum()), count + 1
    if count < 2:
        return None
    whole = float(total.square().sum()) / count  # K ‖ū‖²
    of_mean = (squares - whole) / (count - 1) / count
    return math.sqrt(max(0.0, whole / count - of_mean) / of_mean) if of_mean > 1e-12 * whole else None
