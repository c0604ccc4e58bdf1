"""Membership inference scores, which are higher if a picture is more likely a training example of an adapter.

Three attacks by an adversary that has the base and the adapter. Each score is higher for a likely member:

- loss: minus the denoising loss, at fixed timesteps and noises (Yeom et al., 2018, arXiv:1709.01604, §3.2).
- PIA: ε₀ = ε_θ(x_0, 0) replaces the noise of the picture's own trajectory; minus ‖ε_θ(x_t, t) − ε₀‖₄⁴ at the resulting
  x_t (Kong et al., 2023, arXiv:2305.18355).
- SimA: minus ‖ε_θ(x_0, t)‖₄⁴, one query at the clean picture (Rao et al., 2025, arXiv:2509.25003).

The adversary can also subtract the scores of the base without the adapter, which cancels the
difficulty of the picture itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import counter_rng
from common.seeding import derive_seed
from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import Schedule, add_noise, per_example_loss, predict_x0_and_noise, target
from models.lora.batched_lora import BatchedAdapter
from training.capacity import max_pictures_per_pass
from training.jobs import Examples
from training.passes import pass_size, run_passes

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [N, c, h, w], t [N]) -> the network's prediction for these pictures and their captions."""


class MembershipScores(NamedTuple):
    """Scores of n pictures by three attacks, each float64 [n]."""

    loss: np.ndarray
    pia: np.ndarray
    sima: np.ndarray

    def minus(self, base: MembershipScores) -> MembershipScores:
        """Subtract the scores of the base without the adapter."""
        return MembershipScores(*(score - base_score for score, base_score in zip(self, base, strict=True)))


@torch.no_grad()
def scores(
    base: Denoiser, examples: Examples, adapter: BatchedAdapter, *, timesteps: int, time: float, memory: int
) -> MembershipScores:
    """Score every example under one adapter, with the same noise in every call.

    Args:
        base: the base.
        examples: examples [n].
        adapter: batched adapter of one slot; {} for the base without an adapter.
        timesteps: number of evenly spaced timesteps of the loss.
        time: timestep of PIA and SimA, as a fraction of the schedule.
        memory: bytes for all concurrent passes.
    """
    latents, context = examples.latents.to(base.device, base.full_precision), examples.context.to(base.like)
    timestep_list = ((torch.arange(timesteps) + 0.5) / timesteps * len(base.schedule)).long().tolist()
    keys = counter_rng.child(
        counter_rng.child(derive_seed("membership"), np.arange(len(examples)))[:, None], np.arange(timesteps)
    )
    noise_keys = torch.from_numpy(keys).to(base.device)
    timestep = int(time * len(base.schedule))

    @torch.no_grad()  # is per thread
    def score(part: Tensor) -> Tensor:
        with base.use_adapters([adapter]) as denoise:

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return denoise(x, base.schedule.times[t], context[part])

            x0 = latents[part]
            results = [
                loss_score(base.schedule, predict, x0, timestep_list, noise_keys[part]),
                pia_score(base.schedule, predict, x0, timestep),
                sima_score(base.schedule, predict, x0, timestep),
            ]
        return torch.stack([values.double() for values in results])

    limit = max_pictures_per_pass(base, latents.shape[1:], context.shape[1:], [adapter], memory)
    parts = torch.arange(len(latents), device=base.device).split(pass_size(base.device, len(latents), limit))
    return MembershipScores(*torch.cat(list(run_passes(base.device, score, parts)), dim=1).cpu().numpy())


def loss_score(schedule: Schedule, predict: Predict, x0: Tensor, timestep_list: list[int], keys: Tensor) -> Tensor:
    """Compute minus the mean loss at several timesteps.

    Args:
        schedule: diffusion schedule.
        predict: the network.
        x0: clean latents [N, c, h, w].
        timestep_list: timesteps.
        keys: keys of the noises [N, timesteps].

    Returns:
        Scores [N].
    """
    losses = []
    for index, timestep in enumerate(timestep_list):
        t = torch.full((len(x0),), timestep, device=x0.device)
        noise = counter_rng.normals(keys[:, index], x0[0].numel()).to(x0).view_as(x0)
        losses.append(per_example_loss(predict(add_noise(schedule, x0, noise, t), t), target(schedule, x0, noise, t)))
    return -torch.stack(losses).mean(0)


def pia_score(schedule: Schedule, predict: Predict, x0: Tensor, timestep: int) -> Tensor:
    """Compute minus the distance [N] at a timestep from the start of the picture's own trajectory.

    Args:
        schedule: diffusion schedule.
        predict: the network.
        x0: clean latents [N, c, h, w].
        timestep: timestep t.
    """
    t = torch.full((len(x0),), timestep, device=x0.device)
    start = predicted_noise(schedule, predict, x0, torch.zeros_like(t))
    return -_fourth_powers(predicted_noise(schedule, predict, add_noise(schedule, x0, start, t), t) - start)


def sima_score(schedule: Schedule, predict: Predict, x0: Tensor, timestep: int) -> Tensor:
    """Compute minus the size [N] of the noise that the network predicts for the clean picture at a timestep.

    Args:
        schedule: diffusion schedule.
        predict: the network.
        x0: clean latents [N, c, h, w].
        timestep: timestep t.
    """
    return -_fourth_powers(predicted_noise(schedule, predict, x0, torch.full((len(x0),), timestep, device=x0.device)))


def predicted_noise(schedule: Schedule, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
    """Return ε_θ(x, t) [N, c, h, w], for any parametrization of the network.

    Args:
        schedule: diffusion schedule.
        predict: the network.
        x: noised latents [N, c, h, w].
        t: timesteps [N].
    """
    return predict_x0_and_noise(schedule, x, predict(x, t).to(x.dtype), *schedule.rates(t))[1]


def _fourth_powers(x: Tensor) -> Tensor:
    return x.flatten(1).pow(4).sum(1)
