"""Encode pictures as data URIs, so that a page needs no other file: copies at the size of the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 128
"""Maximum pixels on the longer side: twice the size on the page."""
EXACT = 64
"""Pixels on the longer side up to which a picture is embedded unchanged, if its share of the page allows it."""
PAGE = 3_600_000
"""Maximum characters of all pictures of a page."""
LARGEST = 16_000
"""Maximum characters of one picture: some are on the page twice."""
_QUALITIES = (85, 70, 50, 30)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of a page, encoded once."""

    uri: str
    shape: tuple[int, ...]
    """[H, W] or [H, W, 3], as displayed."""


class Thumbnails:
    """Encoder of the pictures of one page, each within an equal share of `PAGE`."""

    def __init__(self, count: int, *, page: int = PAGE) -> None:
        """Set the limit per picture.

        Args:
            count: number of pictures.
            page: characters for all of them.
        """
        self._max_chars = min(LARGEST, page // max(1, count))

    def __call__(self, pixels: np.ndarray) -> Thumbnail:
        """Return the largest and best copy within the share of one picture; at least 8 pixels wide."""
        for copy, uri in _copies(Image.fromarray(pixels)):
            thumbnail = Thumbnail(uri, (copy.height, copy.width, *pixels.shape[2:]))
            if len(uri) <= self._max_chars:
                break
        return thumbnail


def png(pixels: np.ndarray | Thumbnail) -> str:
    """Return the data URI of a thumbnail, or the lossless one of uint8 [H, W] gray or [H, W, 3] color pixels."""
    return pixels.uri if isinstance(pixels, Thumbnail) else _uri(Image.fromarray(pixels), "PNG", optimize=True)


def _copies(image: Image.Image) -> Iterator[tuple[Image.Image, str]]:
    """Yield copies of a picture with their URIs, each smaller than the previous one."""
    if max(image.size) <= EXACT:
        yield image, _uri(image, "PNG", optimize=True)
    side = SIDE
    while side >= 8:
        copy = image.copy()
        copy.thumbnail((side, side))
        for quality in _QUALITIES:
            yield copy, _uri(copy, "JPEG", quality=quality, optimize=True)
        side //= 2


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
