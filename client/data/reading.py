"""Read and decode a picture file: size limits, orientation, frames, color, background."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from client.data.color import GRAY, to_8_bits, to_srgb
from client.data.formats import NAMES, open_image
from common.errors import AntherError, os_error

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 8  # pixels
MAX_PIXELS = 64_000_000  # of a decoded picture: 4 bytes each, or 9 if some are transparent
MAX_JPEG_PIXELS = 512_000_000  # of a baseline JPEG, which is decoded at half its size or less if it exceeds MAX_PIXELS
DECODING = 2
"""Version of the rules by which a file becomes pixels; latents that were cached under another one are encoded again."""
WHITE = "white"
_ORIENTATION = 0x0112  # EXIF
_JPEG = ("JPEG", "MPO")
_AVERAGED = ("L", "RGB", "CMYK")  # modes that can be averaged in blocks
_TRUNCATED = ("truncated", "unrecognized data stream contents", "buffer is not large enough", "end of data")


def decode(
    path: Path | str,
    file: BinaryIO,
    *,
    background: str = WHITE,
    side: int | None = None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Decode a picture upright, opaque and in sRGB: uint8 `[H, W]` gray or `[H, W, 3]` color.

    Args:
        path: the file's path, or another description, for error messages.
        file: the file, open at its beginning.
        background: color behind transparent parts: a name or `#rrggbb`.
        side: return a smaller copy, if there is one, whose sides all have at least twice this many pixels; None: all
            pixels. JPEGs are decoded at an eighth, a quarter or half their size; other formats are averaged in blocks.
        notes: list that receives a phrase for each conversion; None: they are not determined.

    Raises:
        AntherError: not a picture, damaged, too large or too small.
    """
    from PIL import Image, UnidentifiedImageError  # slow import, so only here

    found: list[str] = [] if notes is None else notes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large or unusual files: they are checked below
            with open_image(path, file) as image:
                if notes is not None:
                    _note_frames(image, notes)
                _limit_size(path, image, side, found)
                image.load()
                upright = _rotate_upright(to_8_bits(path, image, found), found)
                if upright.mode in _AVERAGED and not upright.has_transparency_data:
                    upright = _reduce(upright, side)
                return np.array(_reduce(_flatten(to_srgb(upright, found), background, found), side))
    except AntherError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path, "") from error
    except UnidentifiedImageError as error:
        raise AntherError(f"{path}: can't be read as a picture ({NAMES}); save it again as PNG or JPEG") from error
    except MemoryError as error:
        raise AntherError(f"{path}: needs more memory than is available; save a smaller copy") from error
    except Exception as error:  # decoders raise exceptions of any kind
        raise AntherError(f"{path}: {_damage(error)}") from error


def _damage(error: Exception) -> str:
    if any(words in str(error).lower() for words in _TRUNCATED):
        return "can't be read as a picture: it ends too early; copy it again, or save it again as PNG or JPEG"
    return "can't be read as a picture; save it again as PNG or JPEG"


def open_picture(path: Path) -> BinaryIO:
    """Open a file for reading; AntherError if it can't be opened."""
    try:
        return path.open("rb")
    except OSError as error:
        raise os_error(error, path) from error


def _limit_size(path: Path | str, image: Image, side: int | None, notes: list[str]) -> None:
    """Refuse a picture that is too large or too small, and have a JPEG decoded at a fraction of its size.

    A progressive JPEG is not decoded from above the limit: its decoder keeps the coefficients of the whole picture.
    """
    width, height = image.size
    if min(height, width) < MIN_SIDE:
        raise AntherError(f"{path}: {width}×{height} pixels are too few; use one of at least {MIN_SIDE}×{MIN_SIDE}")
    is_jpeg, factor = image.format in _JPEG, 1
    if width * height > MAX_PIXELS:
        baseline = is_jpeg and not (image.info.get("progressive") or image.info.get("progression"))
        if not baseline or width * height > MAX_JPEG_PIXELS:
            raise _too_many_pixels(path, f", {width}×{height}")
        while width * height > MAX_PIXELS * factor**2:
            factor *= 2
        notes.append(f"{width}×{height} pixels read at 1/{factor} of the size")
    if side is not None:
        factor = max(factor, min(width, height) // (2 * side))
    if is_jpeg and factor > 1:
        image.draft(None, (max(1, width // factor), max(1, height // factor)))


def _too_many_pixels(path: Path | str, size: str) -> AntherError:
    return AntherError(f"{path}: too many pixels{size}; save a smaller copy, of at most {MAX_PIXELS // 10**6} million")


def _note_frames(image: Image, notes: list[str]) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"only the first of {frames} frames is used")


def _rotate_upright(image: Image, notes: list[str]) -> Image:
    """Rotate or flip the picture as its EXIF or XMP orientation says.

    `ImageOps.exif_transpose` isn't used: it also rewrites the EXIF block, and fails on many that cameras write.
    """
    from PIL.Image import Transpose

    transposes = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        transpose = transposes.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF: no orientation
        return image
    if transpose is None:
        return image
    notes.append("turned upright")
    return image.transpose(transpose)


def _flatten(image: Image, background: str, notes: list[str]) -> Image:
    """Convert to gray or RGB, with transparent parts over the background: hidden colors are often noise, or black."""
    from PIL import Image as Pillow
    from PIL import ImageColor

    if not image.has_transparency_data:
        return image.convert("L" if image.mode in GRAY else "RGB")
    color = ImageColor.getrgb(background)[:3]
    mode = "L" if image.mode in GRAY and len(set(color)) == 1 else "RGB"
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] != 255:
        notes.append(f"transparent parts become {background}")
    canvas = Pillow.new(mode, image.size, color[0] if mode == "L" else color)
    canvas.paste(rgba.convert(mode), mask=alpha)
    return canvas


def _reduce(image: Image, side: int | None) -> Image:
    factor = 1 if side is None else min(image.size) // (2 * side)
    return image.reduce(factor) if factor > 1 else image
