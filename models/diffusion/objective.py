"""The forward process x_t = a_t x_0 + σ_t ε, and the network's prediction target.

- diffusion: a_t = √ᾱ_t, σ_t = √(1−ᾱ_t)  (Ho et al., 2020, arXiv:2006.11239, eq. 4); the network predicts ε, or
  v_t = a_t ε − σ_t x_0  (Salimans & Ho, 2022, arXiv:2202.00512, appendix D)
- rectified flow: a_t = 1 − σ_t  (Liu et al., 2022, arXiv:2209.03003, eq. 1); it predicts ε − x_0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import AntherError, shorten

PREDICTIONS = ("epsilon", "v_prediction", "flow")


class SamplingGrid(NamedTuple):
    """Steps of the schedule that are used in sampling, from noise to the clean image; float32."""

    signals: Tensor  # [steps + 1], the last 1
    sigmas: Tensor  # [steps + 1], the last 0
    times: Tensor  # [steps], the network's time input at all but the last


@dataclass(frozen=True)
class Schedule:
    """Forward process of a base, in order of increasing noise; created by `diffusion` or `rectified_flow`."""

    signals: Tensor  # [T] a_t, decreasing
    sigmas: Tensor  # [T] σ_t, increasing
    times: Tensor  # [T] the network's time input
    prediction: str  # 'epsilon' | 'v_prediction' | 'flow'
    shift: float = 1.0  # of a flow's σ during sampling

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise AntherError(
                f"scheduler predicts {shorten(repr(self.prediction))}: only {', '.join(PREDICTIONS)} are supported"
            )

    def __len__(self) -> int:
        return self.signals.shape[0]

    def to(self, device: torch.device) -> Schedule:
        """Return the schedule on another device."""
        signals, sigmas, times = (values.to(device) for values in (self.signals, self.sigmas, self.times))
        return replace(self, signals=signals, sigmas=sigmas, times=times)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_t and σ_t, each [N, 1, 1, 1], at steps t [N]."""
        return self.signals[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a, σ and the network's time input, each [n], at steps t [n] of the evenly spaced sampling schedule."""
        if self.prediction != "flow":
            return self.signals[t], self.sigmas[t], self.times[t]
        sigmas = shift_sigmas((t.double() + 1) / len(self), self.shift).float()
        return 1 - sigmas, sigmas, sigmas * len(self)

    def grid(self, steps: int) -> SamplingGrid:
        """Return `steps` evenly spaced steps, the first with the most noise, and the clean image.

        For a diffusion they are counted from its end (Lin et al., 2023, arXiv:2305.08891, table 2, 'trailing'); for a
        flow they are σ = 1, 1 − 1/steps, …, shifted.
        """
        fraction = 1 - torch.arange(steps, dtype=torch.float64) / steps
        if self.prediction == "flow":
            sigmas = shift_sigmas(fraction, self.shift).float()
            signals, times = 1 - sigmas, sigmas * len(self)
        else:
            t = ((fraction * len(self)).round().long() - 1).clamp_min(0)
            signals, sigmas, times = self.signals.cpu()[t], self.sigmas.cpu()[t], self.times.cpu()[t]
        return SamplingGrid(torch.cat([signals, torch.ones(1)]), torch.cat([sigmas, torch.zeros(1)]), times)


def diffusion(alpha_bars: Tensor, prediction: str) -> Schedule:
    """Return the schedule of decreasing ᾱ [T]; the network's time input is t = 0, …, T − 1."""
    times = torch.arange(len(alpha_bars), device=alpha_bars.device)
    return Schedule(alpha_bars.sqrt(), (1 - alpha_bars).sqrt(), times, prediction)


def rectified_flow(length: int, *, trained_shift: float, shift: float, logit_normal: bool = False) -> Schedule:
    """Return the schedule of σ = 1/T, …, 1, shifted; the network's time input is T σ.

    Args:
        length: T.
        trained_shift: shift of the σ in training, where each step is equally likely.
        shift: shift of the σ in sampling.
        logit_normal: train the middle more often, before the shift: σ are the T quantiles of a standard logit-normal
            (Esser et al., 2024, arXiv:2403.03206, eq. 19), so that a uniformly drawn step has that density.
    """
    plain = torch.arange(1, length + 1, dtype=torch.float64) / length
    if logit_normal:
        plain = torch.special.ndtri(plain - 0.5 / length).sigmoid()
    sigmas = shift_sigmas(plain, trained_shift).float()
    return Schedule(1 - sigmas, sigmas, sigmas * length, "flow", shift)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Shift σ towards noise, as larger images need (Esser et al., 2024, arXiv:2403.03206, eq. 23).

    Args:
        sigmas: σ in [0, 1], of any shape, which the result has too.
        shift: factor of the odds σ / (1 − σ); 1 changes nothing.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = a_t x_0 + σ_t ε.

    Args:
        schedule: the forward process.
        x0: [N, c, h, w].
        noise: ε [N, c, h, w].
        t: steps [N].

    Returns:
        [N, c, h, w].
    """
    signal, sigma = schedule.rates(t)
    return signal * x0 + sigma * noise


def target(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the prediction target at x_t: ε, v_t, or ε − x_0.

    Args:
        schedule: the forward process.
        x0: [N, c, h, w].
        noise: ε [N, c, h, w].
        t: steps [N].

    Returns:
        [N, c, h, w].
    """
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "flow":
        return noise - x0
    signal, sigma = schedule.rates(t)
    return signal * noise - sigma * x0


def predict_x0_and_noise(
    schedule: Schedule, x: Tensor, output: Tensor, signal: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Convert the network's output at x_t to x_0 and ε.

    Args:
        schedule: the forward process.
        x: x_t [N, c, h, w].
        output: the network's output [N, c, h, w].
        signal: a_t.
        sigma: σ_t.

    Returns:
        x_0 and ε, each [N, c, h, w].
    """
    if schedule.prediction == "epsilon":
        return (x - sigma * output) / signal, output
    if schedule.prediction == "flow":
        return x - sigma * output, x + signal * output
    return signal * x - sigma * output, sigma * x + signal * output


def per_example_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the mean squared error of each example [N], never across the batch, so that slots stay independent.

    Args:
        prediction: [N, c, h, w].
        target: [N, c, h, w].
        weights: weights of latent positions [N, h, w], with a mean of 1 for each example; None: all 1.
    """
    squares = (prediction.to(target.dtype) - target).square()
    return (squares if weights is None else squares * weights[:, None]).flatten(1).mean(1)
