"""Evaluation of the base: samples, their legibility, and held-out losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from typefaces.dataset import GLYPHS, caption
from typefaces.judge import Judge, legible
from typefaces.pretraining.diffusion import DenoiseFn, denoising_loss
from typefaces.pretraining.vae import encode
from typefaces.strokes import normalize

BATCH = 248


def sample(
    pipe: StableDiffusionPipeline, classes: NDArray[np.int64], *, guidance: float, steps: int, seed: int
) -> NDArray[np.uint8]:
    """Sample images with the pipeline itself.

    Args:
        pipe: the base.
        classes: glyphs to sample [N], indices into GLYPHS.
        guidance: guidance scale.
        steps: number of sampling steps.
        seed: seed of the noise.

    Returns:
        uint8 [N, 64, 64].
    """
    pictures = []
    for start in range(0, len(classes), BATCH):
        part = classes[start : start + BATCH]
        images = pipe(
            [caption(GLYPHS[i]) for i in part],
            height=64,
            width=64,
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="np",
        ).images
        pictures.append(np.clip(np.rint(images[..., 0] * 255), 0, 255).astype(np.uint8))
    return np.concatenate(pictures)


def legibility(
    pipe: StableDiffusionPipeline, judge: Judge, *, count: int, guidance: float, steps: int, seed: int
) -> tuple[float, NDArray[np.uint8]]:
    """Measure the fraction of samples that the judge reads as their caption.

    Args:
        pipe: the base.
        judge: reads the samples.
        count: number of samples, cycling through all glyphs.
        guidance: guidance scale.
        steps: number of sampling steps.
        seed: seed of the noise.

    Returns:
        The fraction, and the samples uint8 [count, 64, 64].
    """
    classes = np.arange(count) % len(GLYPHS)
    pictures = sample(pipe, classes, guidance=guidance, steps=steps, seed=seed)
    return float(legible(judge.read(pictures), classes).mean()), pictures


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, images: Tensor) -> tuple[float, NDArray[np.uint8]]:
    """Reconstruct uint8 images [N, 1, 64, 64]; return mean |x̂ - x| in [-1, 1], and the results uint8 [N, 64, 64]."""
    errors, restored = [], []
    for part in images.split(512):
        pixels = normalize(part)
        output = vae.decode(encode(vae, pixels)).sample.clamp(-1, 1)
        errors.append((output - pixels).abs().mean(dim=(1, 2, 3)))
        restored.append(((output[:, 0] + 1) * 127.5).round().byte().cpu())
    return float(torch.cat(errors).mean()), torch.cat(restored).numpy()


@torch.no_grad()
def fixed_loss(denoise: DenoiseFn, latents: Tensor, context: Tensor, *, alphas: Tensor, seed: int) -> float:
    """Return the denoising loss in v at the middles of ten equal parts of the schedule, with fixed noise.

    Args:
        denoise: predicts v.
        latents: [N, 4, 16, 16], scaled.
        context: [N, 16, D] of their captions.
        alphas: ᾱ [T].
        seed: seed of the noise.
    """
    losses = []
    for part in range(10):
        generator = Generator(latents.device).manual_seed(seed * 10 + part)
        t = torch.full((len(latents),), int((part + 0.5) * len(alphas) / 10), device=latents.device)
        losses.append(denoising_loss(denoise, latents, context, alphas=alphas, generator=generator, timesteps=t))
    return float(torch.stack(losses).mean())


def sheet(pictures: NDArray[np.uint8], columns: int, file: Path) -> None:
    """Save images as one PNG, row by row.

    Args:
        pictures: uint8 [N, 64, 64].
        columns: images per row.
        file: PNG.
    """
    rows = -(-len(pictures) // columns)
    page = np.full((rows * columns, 64, 64), 255, np.uint8)
    page[: len(pictures)] = pictures
    tiled = page.reshape(rows, columns, 64, 64).transpose(0, 2, 1, 3).reshape(rows * 64, columns * 64)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiled).save(file, optimize=True)
