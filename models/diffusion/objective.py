"""The forward process x_t = a_t x_0 + σ_t ε, and what a network predicts of it.

- diffusion: a_t = √ᾱ_t, σ_t = √(1−ᾱ_t)  (Ho et al., 2020, arXiv:2006.11239, eq. 4); the network predicts ε, or
  v_t = a_t ε − σ_t x_0  (Salimans & Ho, 2022, arXiv:2202.00512, appendix D)
- rectified flow: a_t = 1 − σ_t  (Liu et al., 2022, arXiv:2209.03003, eq. 1); it predicts ε − x_0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import AntherError, shown

PREDICTIONS = ("epsilon", "v_prediction", "flow")


class Grid(NamedTuple):
    """The places that a picture is drawn through, from noise to the clean picture; float32."""

    signals: Tensor  # [steps + 1], the last 1
    sigmas: Tensor  # [steps + 1], the last 0
    times: Tensor  # [steps], what the network is told at all but the last


@dataclass(frozen=True)
class Schedule:
    """The forward process of a base, from little noise to most; made by `diffusion` or `rectified_flow`."""

    signals: Tensor  # [T] a_t, falling
    sigmas: Tensor  # [T] σ_t, rising
    times: Tensor  # [T] what the network is told
    prediction: str  # 'epsilon' | 'v_prediction' | 'flow'
    shift: float = 1.0  # of the σ that a flow's pictures are drawn through

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise AntherError(
                f"scheduler predicts {shown(repr(self.prediction))}: only {', '.join(PREDICTIONS)} are supported"
            )

    def __len__(self) -> int:
        return self.signals.shape[0]

    def to(self, device: torch.device) -> Schedule:
        """The same schedule on another device."""
        signals, sigmas, times = (values.to(device) for values in (self.signals, self.sigmas, self.times))
        return replace(self, signals=signals, sigmas=sigmas, times=times)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and σ_t, each [N, 1, 1, 1], for places [N] in the schedule."""
        return self.signals[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, σ and what the network is told [n] at places [n] of T that are evenly spaced, as pictures are drawn."""
        if self.prediction != "flow":
            return self.signals[t], self.sigmas[t], self.times[t]
        sigmas = shifted((t.double() + 1) / len(self), self.shift).float()
        return 1 - sigmas, sigmas, sigmas * len(self)

    def grid(self, steps: int) -> Grid:
        """`steps` evenly spaced places, the first at most noise, and the clean picture.

        Of a diffusion they are counted from its end (Lin et al., 2023, arXiv:2305.08891, table 2, 'trailing'); of a
        flow they are σ = 1, 1 − 1/steps, …, shifted.
        """
        share = 1 - torch.arange(steps, dtype=torch.float64) / steps
        if self.prediction == "flow":
            sigmas = shifted(share, self.shift).float()
            signals, times = 1 - sigmas, sigmas * len(self)
        else:
            t = ((share * len(self)).round().long() - 1).clamp_min(0)
            signals, sigmas, times = self.signals.cpu()[t], self.sigmas.cpu()[t], self.times.cpu()[t]
        return Grid(torch.cat([signals, torch.ones(1)]), torch.cat([sigmas, torch.zeros(1)]), times)


def diffusion(alpha_bars: Tensor, prediction: str) -> Schedule:
    """The schedule of ᾱ [T], falling; the network is told t = 0, …, T − 1."""
    times = torch.arange(len(alpha_bars), device=alpha_bars.device)
    return Schedule(alpha_bars.sqrt(), (1 - alpha_bars).sqrt(), times, prediction)


def rectified_flow(length: int, *, trained_shift: float, shift: float, logit_normal: bool = False) -> Schedule:
    """The schedule of σ = 1/T, …, 1, shifted; the network is told T σ.

    Args:
        trained_shift: of the σ that are trained, each alike often.
        shift: of the σ that pictures are drawn through.
        logit_normal: train the middle more often, before the shift: σ are the T quantiles of a standard logit-normal
            (Esser et al., 2024, arXiv:2403.03206, eq. 19), so that a place drawn evenly has that density.
    """
    plain = torch.arange(1, length + 1, dtype=torch.float64) / length
    if logit_normal:
        plain = torch.special.ndtri(plain - 0.5 / length).sigmoid()
    sigmas = shifted(plain, trained_shift).float()
    return Schedule(1 - sigmas, sigmas, sigmas * length, "flow", shift)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """σ moved towards noise, as larger pictures need (Esser et al., 2024, arXiv:2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [N, c, h, w]."""
    signal, sigma = schedule.rates(t)
    return signal * x0 + sigma * noise


def target(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict at x_t [N, c, h, w]."""
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "flow":
        return noise - x0
    signal, sigma = schedule.rates(t)
    return signal * noise - sigma * x0


def predict_x0_and_noise(
    schedule: Schedule, x: Tensor, output: Tensor, signal: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The x_0 and the ε [N, c, h, w] that an output stands for at x_t, where a_t = `signal` and σ_t = `sigma`."""
    if schedule.prediction == "epsilon":
        return (x - sigma * output) / signal, output
    if schedule.prediction == "flow":
        return x - sigma * output, x + signal * output
    return signal * x - sigma * output, sigma * x + signal * output


def per_example_loss(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each example [N]: never across the batch, so that slots stay independent."""
    return (prediction.to(wanted.dtype) - wanted).square().flatten(1).mean(1)
