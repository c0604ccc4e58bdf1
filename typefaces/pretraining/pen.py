"""Draw typefaces with a pen: the center lines of their strokes, in any width.

Handwriting has strokes of one width with round ends, which few typefaces have. A *nearness* is an image of center lines
that can be transformed like any image, so that the pen's width stays the same when a glyph is slanted or bent:

    nearness = center_lines(pictures)                       # once for a data set
    drawn = draw(warp(apply_jitter(nearness, …), …), radius)
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

REACH = 7.0
"""Distance from a center line in pixels from which on a nearness is paper."""
PENS = (1.0, 3.2)
"""Smallest and largest radius of a pen in pixels."""
_INK = 110 / 255  # darkness from which on a pixel belongs to a stroke
_SCALE = 2  # center lines are found at twice the resolution, so that they are smooth
_BATCH = 1024


@torch.no_grad()
def center_lines(images: Tensor) -> Tensor:
    """Compute the nearness of each pixel to the center line of a stroke.

    Args:
        images: uint8 [N, 1, H, W], 0 = ink.

    Returns:
        uint8 [N, 1, H, W]: 0 on a center line, 255 at `REACH` pixels or more from it, linear in between.
    """
    parts = []
    for part in images.split(_BATCH):
        darkness = F.interpolate(1 - part.float() / 255, scale_factor=_SCALE, mode="bilinear", align_corners=False)
        distances = F.avg_pool2d(distance(thin(darkness > _INK), int(_SCALE * REACH)), _SCALE) / _SCALE
        parts.append((distances / REACH * 255).clamp(max=255).round().byte())
    return torch.cat(parts)


def draw(nearness: Tensor, radius: Tensor) -> Tensor:
    """Draw center lines with a round pen.

    Args:
        nearness: result of `center_lines` in [-1, 1], maybe transformed, [B, 1, H, W].
        radius: radius of the pen in pixels [B].

    Returns:
        Images in [-1, 1], -1 = ink, with edges one pixel wide.
    """
    distances = (nearness + 1) / 2 * REACH
    return 1 - 2 * (radius[:, None, None, None] - distances + 0.5).clamp(0, 1)


def draw_radii(count: int, generator: Generator) -> Tensor:
    """Draw random radii of pens [count], uniform in `PENS`."""
    low, high = PENS
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def thin(ink: Tensor) -> Tensor:
    """Thin strokes to lines of one pixel that stay connected (Zhang & Suen, 1984, doi:10.1145/357994.358023).

    Args:
        ink: bool [N, 1, H, W].

    Returns:
        bool [N, 1, H, W], a subset of `ink`.
    """
    padded = F.pad(ink.to(torch.uint8), (1, 1, 1, 1))
    inner = padded[:, :, 1:-1, 1:-1]
    tables, changed = [_removable(first).to(ink.device) for first in (True, False)], True
    while changed:
        changed = False
        for table in tables:
            removed = table[_neighbors(padded).int()] & (inner == 1)
            if removed.any():
                changed = True
                inner.masked_fill_(removed, 0)
    return inner.bool()


def _removable(first: bool) -> Tensor:
    """Return whether the first or second subiteration removes a pixel, bool [256] by the bits of `_neighbors`."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    north, _, east, _, south, _, west, _ = bits.T
    count, starts = bits.sum(1), (bits < bits.roll(-1, dims=1)).sum(1)
    last = (west, north) if not first else (south, east)
    open_sides = (north * east * last[0] == 0) & (last[1] * south * west == 0)
    return (count >= 2) & (count <= 6) & (starts == 1) & open_sides


def distance(mask: Tensor, reach: int) -> Tensor:
    """Compute the Euclidean distance to the nearest pixel of a mask, one axis after the other.

    Felzenszwalb & Huttenlocher (2012, doi:10.4086/toc.2012.v008a019), with a bounded distance.

    Args:
        mask: bool [N, 1, H, W].
        reach: larger distances become this one.

    Returns:
        float32 [N, 1, H, W] in pixels.
    """
    squares = torch.where(mask, 0.0, float(reach**2))
    for axis in (2, 3):
        nearest = squares
        for offset in range(1, reach):
            padding = (0, 0, offset, offset) if axis == 2 else (offset, offset, 0, 0)
            shifted = F.pad(squares, padding, value=float(reach**2))
            size = squares.shape[axis]
            either = torch.minimum(shifted.narrow(axis, 0, size), shifted.narrow(axis, 2 * offset, size))
            nearest = torch.minimum(nearest, either + offset**2)
        squares = nearest
    return squares.clamp(max=float(reach**2)).sqrt()


def _neighbors(padded: Tensor) -> Tensor:
    """Return the eight neighbors of each inner pixel as bits, clockwise from the north, uint8."""
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    offsets = [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    parts = (
        padded[..., down : down + height, right : right + width] << bit for bit, (down, right) in enumerate(offsets)
    )
    return functools.reduce(torch.bitwise_or, parts)
