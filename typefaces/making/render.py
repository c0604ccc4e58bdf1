"""Render glyphs: gray, upright, one scale and one baseline per family, horizontally centered by ink."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels
MARGIN = 3  # pixels without ink on every side
OVERSAMPLING = 8  # drawn at 8 × 64 pixels, then averaged over 8 × 8 boxes
EM = 400.0  # pixels per em when a family is measured
FLOURISH = 1.2  # a glyph that is larger than ordinary ones by this factor is shrunk, instead of its whole family

Box = tuple[float, float, float, float]  # left, top, right, bottom of the ink; the baseline is at 0, down is positive


def font(path: Path, index: int, size: float) -> ImageFont.FreeTypeFont:
    """Load a font with basic layout: no ligatures, kerning, or contextual forms.

    Args:
        path: font file.
        index: index of the face in a collection.
        size: pixels per em.
    """
    return ImageFont.truetype(str(path), size, index=index, layout_engine=ImageFont.Layout.BASIC)


def family(path: Path, index: int, characters: str) -> NDArray[np.uint8]:
    """Render a family.

    Args:
        path: font file.
        index: index of the face in a collection.
        characters: characters to render.

    Returns:
        uint8 [len(characters), 64, 64], 0 = ink and 255 = paper, in 16 gray levels.
    """
    measured = font(path, index, EM)
    boxes = {character: measured.getbbox(character, anchor="ls") for character in characters}
    scale, baseline = fit(boxes)
    drawn = measured.font_variant(size=EM * scale * OVERSAMPLING)
    pictures = []
    for character, box in boxes.items():
        shrink = min(1.0, overflow(box, scale, baseline))
        pictures.append(picture(drawn.font_variant(size=drawn.size * shrink), character, baseline))
    return np.stack(pictures)


def fit(boxes: Mapping[str, Box]) -> tuple[float, float]:
    """Return the scale from measured pixels to image pixels, and the baseline's row."""
    ascent = reach({glyph: -box[1] for glyph, box in boxes.items()}, "bdfhklABDEHKLT")
    descent = reach({glyph: box[3] for glyph, box in boxes.items()}, "gpqy")
    width = reach({glyph: box[2] - box[0] for glyph, box in boxes.items()}, "MWmw")
    space = SIDE - 2 * MARGIN
    scale = min(space / (ascent + max(descent, 0.0)), space / width)
    return scale, SIDE / 2 + scale * (ascent - descent) / 2


def reach(extents: Mapping[str, float], ordinary: str) -> float:
    """Return the largest extent, limited relative to ordinary glyphs, so that one large glyph doesn't shrink a
    family."""
    return min(max(extents.values()), FLOURISH * float(np.median([extents[glyph] for glyph in ordinary])))


def overflow(box: Box, scale: float, baseline: float) -> float:
    """Return the scale, relative to the baseline, at which this glyph just fits the image; below 1 it must be shrunk.

    Args:
        box: ink in measured pixels.
        scale: image pixels per measured pixel.
        baseline: row of the baseline in the image.
    """
    left, top, right, bottom = (scale * side for side in box)
    return min(
        (baseline - 1) / max(-top, 1e-6),
        (SIDE - 1 - baseline) / max(bottom, 1e-6),
        (SIDE - 2) / max(right - left, 1e-6),
    )


def picture(drawn: ImageFont.FreeTypeFont, character: str, baseline: float) -> NDArray[np.uint8]:
    """Render one glyph, uint8 [64, 64].

    Args:
        drawn: font at eight times the final size.
        character: character to render.
        baseline: row of the baseline in the image.
    """
    canvas = Image.new("L", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), 255)
    left, _, right, _ = drawn.getbbox(character, anchor="ls")
    origin = (round(SIDE * OVERSAMPLING / 2 - (left + right) / 2), round(baseline * OVERSAMPLING))
    ImageDraw.Draw(canvas).text(origin, character, font=drawn, fill=0, anchor="ls")
    gray = np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.uint16)
    return ((gray + 8) // 17 * 17).astype(np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image of 16 gray levels as a 4-bit PNG."""
    height, width = image.shape
    levels = image // 17
    rows = (levels[:, 0::2] << 4) | levels[:, 1::2]
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)  # 4-bit grayscale
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
