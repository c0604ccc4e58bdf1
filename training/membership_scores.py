"""Scores of membership: how well the base with an adapter seems to know a picture.

Three attacks of someone who holds the base and the adapter, each higher for a picture that seems to be a member:

- loss: minus the denoising loss, at fixed timesteps and noises (Yeom et al., 2018, arXiv:1709.01604, §3.2).
- PIA: ε₀ = ε_θ(x_0, 0) stands for the noise of the picture's own trajectory; minus ‖ε_θ(x_t, t) − ε₀‖₄⁴ at the x_t
  that it leads to (Kong et al., 2023, arXiv:2305.18355).
- SimA: minus ‖ε_θ(x_0, t)‖₄⁴, one query at the picture as it is (Rao et al., 2025, arXiv:2509.25003).

Whoever holds the base can also subtract what it says alone: how easy a picture is by itself then cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import counter_rng
from common.seeding import derive_seed
from models.base.denoiser import Denoiser
from models.diffusion.objective import Schedule, add_noise, per_example_loss, predict_x0_and_noise, target
from models.lora.batched_lora import BatchedAdapter
from training.capacity import max_pictures_per_pass
from training.jobs import Examples
from training.parallel_passes import pass_size, run_passes

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [N, c, h, w], t [N]) -> what the network predicts for these pictures and their captions."""


class MembershipScores(NamedTuple):
    """Of n pictures, each float64 [n]."""

    loss: np.ndarray
    pia: np.ndarray
    sima: np.ndarray

    def minus(self, base: MembershipScores) -> MembershipScores:
        """How much better than the base alone the adapter seems to know them."""
        return MembershipScores(*(own - alone for own, alone in zip(self, base, strict=True)))


@torch.no_grad()
def scores(
    base: Denoiser, examples: Examples, adapter: BatchedAdapter, *, timesteps: int, time: float, memory: int
) -> MembershipScores:
    """Scores of every example under one adapter ({}: the base alone), from the same noise every time.

    Args:
        timesteps: of the loss, evenly spaced.
        time: of PIA and SimA, as a share of the schedule.
        memory: bytes for all passes that run at once.
    """
    latents, context = examples.latents.to(base.device, base.full_precision), examples.context.to(base.like)
    looks = ((torch.arange(timesteps) + 0.5) / timesteps * len(base.schedule)).long().tolist()
    keys = counter_rng.child(
        counter_rng.child(derive_seed("membership"), np.arange(len(examples)))[:, None], np.arange(timesteps)
    )
    noise_keys = torch.from_numpy(keys).to(base.device)
    at = int(time * len(base.schedule))

    @torch.no_grad()  # per thread
    def score(part: Tensor) -> Tensor:
        with base.use_adapters([adapter]) as denoise:

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return denoise(x, base.schedule.times[t], context[part])

            x0 = latents[part]
            found = [
                loss_score(base.schedule, predict, x0, looks, noise_keys[part]),
                pia_score(base.schedule, predict, x0, at),
                sima_score(base.schedule, predict, x0, at),
            ]
        return torch.stack([values.double() for values in found])

    most = max_pictures_per_pass(base, latents.shape[1:], context.shape[1:], [adapter], memory)
    parts = torch.arange(len(latents), device=base.device).split(pass_size(base.device, len(latents), most))
    return MembershipScores(*torch.cat(list(run_passes(base.device, score, parts)), dim=1).cpu().numpy())


def loss_score(schedule: Schedule, predict: Predict, x0: Tensor, looks: list[int], keys: Tensor) -> Tensor:
    """Minus the mean loss [N] at these timesteps, with the noise of each entry's own keys [N, timesteps]."""
    losses = []
    for place, look in enumerate(looks):
        t = torch.full((len(x0),), look, device=x0.device)
        noise = counter_rng.normals(keys[:, place], x0[0].numel()).to(x0).view_as(x0)
        losses.append(per_example_loss(predict(add_noise(schedule, x0, noise, t), t), target(schedule, x0, noise, t)))
    return -torch.stack(losses).mean(0)


def pia_score(schedule: Schedule, predict: Predict, x0: Tensor, at: int) -> Tensor:
    """Minus the distance [N] at timestep `at` from where the picture's own trajectory begins."""
    t = torch.full((len(x0),), at, device=x0.device)
    start = predicted_noise(schedule, predict, x0, torch.zeros_like(t))
    return -_fourth_powers(predicted_noise(schedule, predict, add_noise(schedule, x0, start, t), t) - start)


def sima_score(schedule: Schedule, predict: Predict, x0: Tensor, at: int) -> Tensor:
    """Minus the size [N] of the noise that is seen at timestep `at` in the picture as it is."""
    return -_fourth_powers(predicted_noise(schedule, predict, x0, torch.full((len(x0),), at, device=x0.device)))


def predicted_noise(schedule: Schedule, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
    """ε_θ(x, t) [N, c, h, w], whatever the network predicts."""
    return predict_x0_and_noise(schedule, x, predict(x, t).to(x.dtype), *schedule.rates(t))[1]


def _fourth_powers(x: Tensor) -> Tensor:
    return x.flatten(1).pow(4).sum(1)
