"""Decode latents in little memory: in tiles, and with a small VAE in place of the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import AntherError
from models.files.diffusers_classes import diffusers_class
from models.files.loading import load_network

TILE = 256  # side in pixels: a VAE needs more memory than the network, in proportion to the decoded area

_EVEN = 8  # latents: a tile's side is a multiple of this, so that tiles overlap by whole latents


def small_vae(folder: Path) -> Any:
    """Load a distilled decoder such as TAESD, an AutoencoderTiny in diffusers' layout; AntherError if it isn't one."""
    return load_network(diffusers_class("AutoencoderTiny"), folder)


def in_tiles(vae: Any, side: int, scale: int) -> None:
    """Make a VAE decode in overlapping, blended tiles; an image no larger than a tile is decoded whole.

    Args:
        vae: changed in place.
        side: side of a tile, in pixels.
        scale: pixels per latent.

    Raises:
        AntherError: tiles of this side don't overlap evenly.
    """
    if side <= 0 or side % (_EVEN * scale):
        raise AntherError(f"tiles of {side} pixels: must be a multiple of {_EVEN * scale}")
    if hasattr(vae, "tile_sample_min_size"):  # AutoencoderKL and AutoencoderTiny take no arguments
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale
        vae.spatial_scale_factor = scale  # AutoencoderTiny takes 2 to the number of color channels
    else:
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
