"""From latents to pixels in little memory: in tiles, and by a small VAE in the place of the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import AntherError
from models.base.loading import load_network

TILE = 256  # pixels a side: a VAE takes more memory than the network, in proportion to what it decodes at once

_EVEN = 8  # latents: what a tile's side is a multiple of, so that tiles overlap by whole ones


def small_vae(folder: Path) -> Any:
    """A distilled decoder, such as TAESD: an AutoencoderTiny in diffusers' layout; AntherError if it is none."""
    from diffusers import AutoencoderTiny  # slow import, so only here

    return load_network(AutoencoderTiny, folder)


def in_tiles(vae: Any, side: int, scale: int) -> None:
    """Let a VAE decode pieces of so many pixels a side, which overlap and are blended.

    A picture that is no larger is decoded whole.

    Args:
        scale: pixels to a latent.

    Raises:
        AntherError: tiles of that side don't overlap evenly.
    """
    if side <= 0 or side % (_EVEN * scale):
        raise AntherError(f"tiles of {side} pixels: must be a multiple of {_EVEN * scale}")
    if hasattr(vae, "tile_sample_min_size"):  # AutoencoderKL and AutoencoderTiny, which have no arguments for it
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale
        vae.spatial_scale_factor = scale  # AutoencoderTiny takes it for 2 to the number of colours
    else:
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
