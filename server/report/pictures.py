"""Pictures as data URIs, so that a page needs no file beside it: small copies, as large as a page shows them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 128
"""Pixels on the longer side, at most: twice what the page shows them at."""
EXACT = 64
"""Up to so many pixels on a side a picture is kept as it is, if there is room for it."""
PAGE = 3_600_000
"""Characters that all pictures of a page take together, at most."""
LARGEST = 16_000
"""Characters that one takes, at most: some are on the page twice."""
_QUALITIES = (85, 70, 50, 30)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of a page, encoded once."""

    uri: str
    shape: tuple[int, ...]
    """[H, W] or [H, W, 3], as it is shown."""


class Thumbnails:
    """Encodes the pictures of one page, each in an equal share of what the page has room for."""

    def __init__(self, count: int, *, page: int = PAGE) -> None:
        """Args:
        count: how many there will be.
        page: characters for all of them.
        """
        self._most = min(LARGEST, page // max(1, count))

    def __call__(self, pixels: np.ndarray) -> Thumbnail:
        """The largest and best copy that its share has room for; the last resort is 8 pixels wide."""
        for copy, uri in _copies(Image.fromarray(pixels)):
            last = Thumbnail(uri, (copy.height, copy.width, *pixels.shape[2:]))
            if len(uri) <= self._most:
                break
        return last


def png(pixels: np.ndarray | Thumbnail) -> str:
    """The data URI of a picture: of a thumbnail as it is, of uint8 [H, W] gray or [H, W, 3] color exactly."""
    return pixels.uri if isinstance(pixels, Thumbnail) else _uri(Image.fromarray(pixels), "PNG", optimize=True)


def _copies(image: Image.Image) -> Iterator[tuple[Image.Image, str]]:
    """Copies of a picture with their URIs, each smaller than the one before."""
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
