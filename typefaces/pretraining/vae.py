"""Objective of the autoencoder, and the scaling factor of its latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def reparameterize(moments: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sample latents and return (sample [B, 4, h, w], KL per latent element) from moments [B, 8, h, w].

    Kingma & Welling (2014): z = μ + σ ε; KL(N(μ, σ²) ‖ N(0, 1)) = (μ² + σ² - 1 - log σ²) / 2.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return mean + (0.5 * log_variance).exp() * noise, kl.mean()


def reconstruction_loss(restored: Tensor, images: Tensor) -> Tensor:
    """Compute L1 + L2: the first keeps edges sharp, the second penalizes missing strokes."""
    error = restored.float() - images
    return error.abs().mean() + error.square().mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the posterior means [N, 4, h, w] of images [N, 1, H, W] in [-1, 1], unscaled."""
    return vae.encode(images).latent_dist.mean


def scaling_factor(latents: Tensor) -> float:
    """Return 1 / std over all elements (Rombach et al., 2022), so that scaled latents have unit variance."""
    return 1.0 / float(latents.float().std())
