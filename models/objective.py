"""The denoising objective, for ε- and v-prediction.

x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε  (Ho et al., 2020, arXiv:2006.11239, eq. 4)
v_t = √ᾱ_t ε − √(1−ᾱ_t) x_0  (Salimans & Ho, 2022, arXiv:2202.00512, appendix D)
"""

from __future__ import annotations

from dataclasses import dataclass

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
    return (prediction.float() - wanted).square().flatten(1).mean(1)


def stratified_timesteps(count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count] timesteps, one from each of `count` equal strata (Kingma et al., 2021, arXiv:2107.00630, I.1).

    Each is uniform on range(length), and a small batch still sees early and late steps.
    """
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    return (((start + order / count) % 1) * length).long()
