"""Public families as tensors: held-out split and augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from typefaces.dataset import GLYPHS, Typeface
from typefaces.strokes import thicken


def held_out(design: str, *, share: float, seed: int) -> bool:
    """Return whether a design is held out; decided by a hash, so that all families of a design agree.

    Args:
        design: id of the design.
        share: fraction of designs that is held out.
        seed: seed of the hash.
    """
    digest = hashlib.sha256(f"{seed}:{design}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def split_held_out(families: Sequence[Typeface], *, share: float, seed: int) -> tuple[list[Typeface], list[Typeface]]:
    """Split families by design: (training families, held-out families).

    Args:
        families: families to split.
        share: fraction of designs that is held out.
        seed: seed of the choice.
    """
    is_held_out = [held_out(family.design, share=share, seed=seed) for family in families]
    return (
        [family for family, out in zip(families, is_held_out, strict=True) if not out],
        [family for family, out in zip(families, is_held_out, strict=True) if out],
    )


def pictures(families: Sequence[Typeface]) -> Tensor:
    """Stack the images of families: uint8 [families × 62, 1, 64, 64]; glyph i of family f is row 62 f + i."""
    return torch.from_numpy(np.concatenate([family.images for family in families]))[:, None]


def glyph_class(rows: Tensor) -> Tensor:
    """Return the glyph class of rows of `pictures`."""
    return rows % len(GLYPHS)


@dataclass(frozen=True)
class Jitter:
    """Ranges of a random augmentation, each drawn uniformly from ±value; 0 disables that aspect."""

    shift: float = 0.0  # in half widths of the image, both axes
    width: float = 0.0  # relative horizontal scale
    height: float = 0.0  # relative vertical scale (moves baselines: not for the base)
    slant: float = 0.0  # shear: tangent of the angle
    weight: float = 0.0  # change of stroke width in pixels per side, at most 1

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw values [count, 6]: horizontal shift, vertical shift, width, height, slant, weight."""
        reach = torch.tensor((self.shift, self.shift, self.width, self.height, self.slant, self.weight))
        uniform = torch.rand(count, 6, generator=generator, device=generator.device) * 2 - 1
        return uniform * reach.to(generator.device)


def apply_jitter(images: Tensor, values: Tensor) -> Tensor:
    """Transform images [B, 1, H, W] in [-1, 1], paper +1, each by its row of `Jitter.draw`."""
    right, down, width, height, slant, weight = values.unbind(dim=1)
    across = torch.stack([1 / (1 + width), slant, right], dim=1)
    up = torch.stack([torch.zeros_like(height), 1 / (1 + height), down], dim=1)
    grid = F.affine_grid(torch.stack([across, up], dim=1), list(images.shape), align_corners=False)
    return 1 - thicken(F.grid_sample(1 - images, grid, align_corners=False), weight)


def warp(images: Tensor, reach: float, generator: Generator, *, cells: int = 4) -> Tensor:
    """Distort images by a smooth random field (Simard et al., 2003).

    Args:
        images: [B, 1, H, W] in [-1, 1], paper +1.
        reach: maximum displacement in half widths of the image.
        generator: generator of the field.
        cells: random displacements along each axis, which are interpolated.
    """
    coarse = (torch.rand(len(images), 2, cells, cells, generator=generator, device=images.device) * 2 - 1) * reach
    field = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=True)
    still = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False) + field.permute(0, 2, 3, 1)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)
