"""Formats of picture files, recognized by content, and the decoders that Pillow may use for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from common.errors import AntherError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The decoders that Pillow may always try, for any file name: it has about forty, and one of them runs Ghostscript."""
NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
HEIC_EXTRA = "pip install 'anther[heic]'"
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_HEAD = 64  # bytes, which contain the brands of an AVIF or HEIC file


def open_image(path: Path | str, file: BinaryIO) -> Image:
    """Open a picture with the decoder of its content, without decoding it.

    Pillow refuses pictures far above 89 megapixels. Baseline JPEGs are opened nevertheless, because they can be decoded
    at a fraction of their size.

    Args:
        path: the file's path, or another description, for error messages.
        file: the file, open at its beginning.

    Raises:
        AntherError: a library for this format is not installed.
        Exception: as by Pillow, not a picture.
    """
    from PIL import Image, JpegImagePlugin  # slow import, so only here

    head = file.read(_HEAD)
    file.seek(0)
    if not head:
        raise AntherError(f"{path}: is empty; copy it again")
    try:
        return Image.open(file, formats=_decoders(path, head))
    except Image.DecompressionBombError:
        if not head.startswith(b"\xff\xd8"):
            raise
        file.seek(0)
        return JpegImagePlugin.JpegImageFile(file)


def _decoders(path: Path | str, head: bytes) -> tuple[str, ...]:
    """Return the decoders for a file that begins with `head`; those for AVIF and HEIC only for such files."""
    brands = _brands(head)
    if brands & _AVIF:
        return (_avif(path),)
    if brands & _HEIC:
        return (_heic(path),)
    return FORMATS


def _brands(head: bytes) -> set[bytes]:
    """Return the brands of an ISO media file: the major one, and the compatible ones in its first box."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(len(head), int.from_bytes(head[:4], "big"))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}


def _avif(path: Path | str) -> str:
    from PIL import features

    if not features.check("avif"):
        raise AntherError(f"{path}: AVIF needs Pillow 11.3 or later: pip install -U pillow, or save it as JPEG")
    return "AVIF"


def _heic(path: Path | str) -> str:
    try:
        import pillow_heif
    except ImportError:
        raise AntherError(
            f"{path}: HEIC needs an optional library: {HEIC_EXTRA}, or save the picture as JPEG"
        ) from None
    pillow_heif.register_heif_opener()
    return "HEIF"
