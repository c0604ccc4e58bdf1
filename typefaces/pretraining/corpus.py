"""Public families as tensors: which are held out, and how a glyph may be varied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from typefaces.dataset import GLYPHS, Typeface


def held_out(design: str, *, share: float, seed: int) -> bool:
    """Whether a design is kept from training: a hash decides, so that all families of a design agree."""
    digest = hashlib.sha256(f"{seed}:{design}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def split_held_out(families: Sequence[Typeface], *, share: float, seed: int) -> tuple[list[Typeface], list[Typeface]]:
    """(training families, held-out families)."""
    held = [held_out(family.design, share=share, seed=seed) for family in families]
    return (
        [family for family, out in zip(families, held, strict=True) if not out],
        [family for family, out in zip(families, held, strict=True) if out],
    )


def pictures(families: Sequence[Typeface]) -> Tensor:
    """uint8 [families × 62, 1, 64, 64]; glyph i of family f is row 62 f + i."""
    return torch.from_numpy(np.concatenate([family.images for family in families]))[:, None]


def normalize(images: Tensor) -> Tensor:
    """uint8 [..., 64, 64], 0 = ink -> float in [-1, 1], -1 = ink."""
    return images.float() / 127.5 - 1


def glyph_class(rows: Tensor) -> Tensor:
    """The glyph class of rows of `pictures`."""
    return rows % len(GLYPHS)


@dataclass(frozen=True)
class Jitter:
    """Ranges of a random variation, each drawn uniformly from ±value; 0 leaves that aspect alone."""

    shift: float = 0.0  # of the picture's half width, both axes
    width: float = 0.0  # relative scale across
    height: float = 0.0  # relative scale up (moves baselines: not for the base)
    slant: float = 0.0  # shear, tangent of the angle
    weight: float = 0.0  # strokes thicker or thinner, in pixels on each side, at most 1

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Values [count, 6]: shift across, shift up, width, height, slant, weight."""
        reach = torch.tensor((self.shift, self.shift, self.width, self.height, self.slant, self.weight))
        uniform = torch.rand(count, 6, generator=generator, device=generator.device) * 2 - 1
        return uniform * reach.to(generator.device)


def apply_jitter(images: Tensor, values: Tensor) -> Tensor:
    """Images [B, 1, H, W] in [-1, 1], paper +1, each varied by its row of `Jitter.draw`."""
    right, down, width, height, slant, weight = values.unbind(dim=1)
    across = torch.stack([1 / (1 + width), slant, right], dim=1)
    up = torch.stack([torch.zeros_like(height), 1 / (1 + height), down], dim=1)
    grid = F.affine_grid(torch.stack([across, up], dim=1), list(images.shape), align_corners=False)
    return 1 - thicken(F.grid_sample(1 - images, grid, align_corners=False), weight)


def warp(images: Tensor, reach: float, generator: Generator) -> Tensor:
    """Images [B, 1, H, W] bent by a smooth random field (Simard et al., 2003) of ±reach half widths."""
    coarse = (torch.rand(len(images), 2, 4, 4, generator=generator, device=images.device) * 2 - 1) * reach
    field = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=True)
    still = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False) + field.permute(0, 2, 3, 1)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)


def thicken(ink: Tensor, pixels: Tensor) -> Tensor:
    """Ink [B, 1, H, W] (paper 0) dilated by `pixels` [B] in [-1, 1], eroded where negative."""
    dilated = F.max_pool2d(ink, 3, stride=1, padding=1)
    eroded = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    amount = pixels[:, None, None, None]
    return ink + amount.clamp(min=0) * (dilated - ink) + amount.clamp(max=0).abs() * (eroded - ink)
