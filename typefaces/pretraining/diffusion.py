"""Denoising objective: v-prediction (Salimans & Ho, 2022), optionally weighted by min-SNR (Hang et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

DenoiseFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noisy [B,4,H,W], t [B], context [B,L,D]) -> v


def diffuse(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise: z = √ᾱ x + √(1-ᾱ) ε, with the target v = √ᾱ ε - √(1-ᾱ) x.

    Args:
        x: latents [B, 4, H, W].
        noise: ε, with the shape of x.
        alpha_bar: ᾱ [B].

    Returns:
        z and v, with the shape of x.
    """
    signal = alpha_bar.sqrt()[:, None, None, None]
    sigma = (1 - alpha_bar).sqrt()[:, None, None, None]
    return signal * x + sigma * noise, signal * noise - sigma * x


def min_snr_weights(alpha_bar: Tensor, gamma: float | None) -> Tensor:
    """Return weights [B] of the squared error in v: min(SNR, γ) / (SNR + 1), SNR = ᾱ / (1-ᾱ); 1 without γ.

    Written as min(ᾱ, γ (1-ᾱ)), which is finite at both ends of the schedule.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    return torch.minimum(alpha_bar, gamma * (1 - alpha_bar))


def stratified_timesteps(count: int, total: int, generator: Generator) -> Tensor:
    """Draw one timestep from each of `count` equal parts of [0, total), in random order.

    Args:
        count: number of timesteps.
        total: length of the schedule.
        generator: generator of the order and the timesteps.

    Returns:
        int64 [count].
    """
    device = generator.device
    strata = torch.randperm(count, generator=generator, device=device)
    draws = torch.rand(count, generator=generator, device=device)
    return ((strata + draws) / count * total).long().clamp(max=total - 1)


def denoising_loss(
    denoise: DenoiseFn,
    latents: Tensor,
    context: Tensor,
    *,
    alphas: Tensor,
    generator: Generator,
    gamma: float | None = None,
    timesteps: Tensor | None = None,
) -> Tensor:
    """Return the mean over the batch of w(t) ‖v̂ - v‖² / numel.

    Args:
        denoise: predicts v.
        latents: [B, 4, H, W].
        context: [B, L, D].
        alphas: ᾱ [T].
        generator: generator of noise and timesteps.
        gamma: γ of min-SNR weighting; None: uniform weights.
        timesteps: timesteps [B]; default: stratified random ones.
    """
    if timesteps is None:
        timesteps = stratified_timesteps(len(latents), len(alphas), generator)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    alpha_bar = alphas[timesteps]
    noisy, target = diffuse(latents, noise, alpha_bar)
    error = (denoise(noisy, timesteps, context).float() - target).square().mean(dim=(1, 2, 3))
    return (min_snr_weights(alpha_bar, gamma) * error).mean()


def drop_captions(classes: Tensor, *, empty: int, share: float, generator: Generator) -> Tensor:
    """Replace a random fraction of classes [B] by the empty caption (Ho & Salimans, 2022).

    Args:
        classes: [B].
        empty: class of the empty caption.
        share: probability of replacement.
        generator: generator of the choice.
    """
    dropped = torch.rand(classes.shape, generator=generator, device=classes.device) < share
    return classes.masked_fill(dropped, empty)
