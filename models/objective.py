"""The denoising objective, for ε- and v-prediction.

x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε  (Ho et al., 2020, arXiv:2006.11239, eq. 4)
v_t = √ᾱ_t ε − √(1−ᾱ_t) x_0  (Salimans & Ho, 2022, arXiv:2202.00512, appendix D)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.errors import AntherError


@dataclass(frozen=True)
class Schedule:
    """The forward process of a base, from its scheduler's own configuration."""

    alpha_bars: Tensor  # [T] ᾱ_t, falling
    prediction: str  # 'epsilon' | 'v_prediction'

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise AntherError(f"scheduler predicts {self.prediction!r}: epsilon and v_prediction are supported")

    def __len__(self) -> int:
        return self.alpha_bars.shape[0]

    def to(self, device: torch.device) -> Schedule:
        """The same schedule on another device."""
        return replace(self, alpha_bars=self.alpha_bars.to(device))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1−ᾱ_t), each [N, 1, 1, 1], for timesteps [N]."""
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def noised(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [N, c, h, w]."""
    signal, sigma = schedule.rates(t)
    return signal * x0 + sigma * noise


def target(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict at x_t [N, c, h, w]."""
    if schedule.prediction == "epsilon":
        return noise
    signal, sigma = schedule.rates(t)
    return signal * noise - sigma * x0


def per_example_loss(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each example [N]: never across the batch, so that slots stay independent."""
    return (prediction.to(wanted.dtype) - wanted).square().flatten(1).mean(1)
