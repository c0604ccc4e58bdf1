"""Pictures whose file is in memory, as bytes of a Parquet file: decoded whenever their pixels are needed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import numpy as np

from client.data import WHITE
from client.data.reading import decode
from training.jobs import Picture


class EncodedPicture(Picture):
    """A picture backed by the bytes of its file, which are much smaller than its pixels."""

    __slots__ = ("_data", "background", "sha256", "source")

    def __init__(self, source: str, data: bytes, caption: str, *, background: str = WHITE) -> None:
        """Hash the bytes; they are not decoded.

        Args:
            source: origin of the picture, for error messages.
            data: bytes of the file.
            caption: its caption.
            background: color behind transparent parts.
        """
        self.source, self.caption, self.background = source, caption, background
        self._data = data
        self.sha256 = hashlib.sha256(data).hexdigest()

    @property
    def pixels(self) -> np.ndarray:
        """All pixels; AntherError if the bytes can't be read as a picture."""
        return self._decode(side=None)

    def at_least(self, side: int) -> np.ndarray:
        """Decode a copy with sides of at least twice `side` pixels, if the picture is that large."""
        return self._decode(side=side)

    def content(self) -> Iterator[bytes]:
        """Yield a hash of the file in place of its pixels, as a picture on disk does."""
        yield repr(("file", self.sha256, self.background, self.caption)).encode()

    def _decode(self, side: int | None) -> np.ndarray:
        return decode(self.source, io.BytesIO(self._data), background=self.background, side=side)
