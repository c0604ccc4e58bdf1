"""Read and decode a picture file: formats, size limits, orientation, background."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from common.errors import AntherError, os_error

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The only decoders that Pillow may try, for any file name: it has about forty, and one of them runs Ghostscript."""
FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP or TIFF"
MIN_SIDE = 8  # pixels
MAX_PIXELS = 64_000_000  # 4 bytes each, or 9 if some are transparent
WHITE = "white"
_ORIENTATION = 0x0112  # EXIF
_GRAY = ("1", "L", "LA", "La")


def decode(path: Path | str, file: BinaryIO, *, background: str = WHITE, side: int | None = None) -> np.ndarray:
    """Decode a picture upright and opaque: uint8 `[H, W]` gray or `[H, W, 3]` color.

    Args:
        path: the file's path, or another description, for error messages.
        file: the file, open at its beginning.
        background: color behind transparent parts: a name or `#rrggbb`.
        side: return a smaller copy, if there is one, whose sides all have at least twice this many pixels; None: all
            pixels. JPEGs are decoded at an eighth, a quarter or half their size; other formats are averaged in blocks.

    Raises:
        AntherError: not a picture, damaged, too large or too small.
    """
    from PIL import Image, UnidentifiedImageError  # slow import, so only here

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large or unusual files: they are checked below
            with Image.open(file, formats=FORMATS) as image:
                _check_size(path, *image.size)
                if side is not None and image.format in ("JPEG", "MPO"):
                    image.draft(None, (2 * side, 2 * side))
                image.load()
                _check_depth(path, image.mode)
                return np.array(_reduce(_flatten(_rotate_upright(image), background), side))
    except AntherError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path, "") from error
    except UnidentifiedImageError as error:
        raise AntherError(
            f"{path}: can't be read as a picture ({FORMAT_NAMES}); save it again as PNG or JPEG"
        ) from error
    except MemoryError as error:
        raise AntherError(f"{path}: needs more memory than is available; save a smaller copy") from error
    except Exception as error:  # decoders raise exceptions of any kind
        raise AntherError(f"{path}: can't be read as a picture; save it again as PNG or JPEG") from error


def open_picture(path: Path) -> BinaryIO:
    """Open a file for reading; AntherError if it can't be opened."""
    try:
        return path.open("rb")
    except OSError as error:
        raise os_error(error, path) from error


def _check_size(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(path, f", {width}×{height}")
    if min(height, width) < MIN_SIDE:
        raise AntherError(f"{path}: {width}×{height} pixels are too few; use one of at least {MIN_SIDE}×{MIN_SIDE}")


def _too_many_pixels(path: Path | str, size: str) -> AntherError:
    return AntherError(f"{path}: too many pixels{size}; save a smaller copy, of at most {MAX_PIXELS // 10**6} million")


def _check_depth(path: Path | str, mode: str) -> None:
    if mode.startswith(("I", "F")):
        raise AntherError(f"{path}: has more than 8 bits a channel; save it as an 8-bit PNG or JPEG")


def _rotate_upright(image: Image) -> Image:
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
    return image if transpose is None else image.transpose(transpose)


def _flatten(image: Image, background: str) -> Image:
    """Convert to gray or RGB, with transparent parts over the background: hidden colors are often noise, or black."""
    from PIL import Image as Pillow
    from PIL import ImageColor

    if not image.has_transparency_data:
        return image.convert("L" if image.mode in _GRAY else "RGB")
    color = ImageColor.getrgb(background)[:3]
    mode = "L" if image.mode in _GRAY and len(set(color)) == 1 else "RGB"
    rgba = image.convert("RGBA")
    canvas = Pillow.new(mode, image.size, color[0] if mode == "L" else color)
    canvas.paste(rgba.convert(mode), mask=rgba.getchannel("A"))
    return canvas


def _reduce(image: Image, side: int | None) -> Image:
    factor = 1 if side is None else min(image.size) // (2 * side)
    return image.reduce(factor) if factor > 1 else image
