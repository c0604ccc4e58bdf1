"""One picture of a person, with its captions and its mask."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Picture:
    """One picture, uint8 [H, W] gray or [H, W, 3] color, and its caption.

    This class holds the pixels in memory, and one caption. A subclass that reads them from a file on demand overrides
    all but the caption.
    """

    __slots__ = ("_pixels", "caption")

    def __init__(self, pixels: np.ndarray, caption: str) -> None:
        self._pixels, self.caption = pixels, caption

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions of the picture, the first one first."""
        return (self.caption,)

    @property
    def pixels(self) -> np.ndarray:
        """All pixels, uint8 [H, W] or [H, W, 3]."""
        return self._pixels

    def at_least(self, side: int) -> np.ndarray:
        """Return the pixels, or a smaller copy of sufficient resolution for any use at `side` pixels.

        Args:
            side: side of the square that is used, in pixels.

        Returns:
            uint8 [h, w] or [h, w, 3].
        """
        del side
        return self.pixels

    def mask(self) -> np.ndarray | None:
        """Return the weights of its parts in the loss, float32 [H, W] of any scale, or None: all are equal."""
        return None

    def content(self) -> Iterator[bytes]:
        """Yield bytes that differ if the visible content or the caption differs."""
        yield repr((self.pixels.shape, len(self.caption.encode()), self.caption)).encode()
        yield np.ascontiguousarray(self.pixels).tobytes()
