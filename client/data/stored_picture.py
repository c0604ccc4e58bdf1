"""Pictures that stay on disk: identified by content, and decoded whenever their pixels are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from client.data.reading import WHITE, decode, open_picture
from common.errors import AntherError, os_error
from training.jobs import Picture

_MASK_SIDE = 64  # pixels of the picture that a mask is compared with
_verified: set[tuple[str, str]] = set()
"""(SHA-256, background) of pictures that this process has verified by decoding."""


class StoredPicture(Picture):
    """A picture backed by its file. Its pixels take memory only while they are used."""

    __slots__ = ("background", "further_captions", "mask_path", "path", "sha256")

    def __init__(
        self,
        path: Path,
        caption: str,
        *,
        background: str = WHITE,
        verify: bool = True,
        further_captions: tuple[str, ...] = (),
        mask: Path | None = None,
    ) -> None:
        """Hash the file, and decode it once unless this process already has.

        Args:
            path: the file.
            caption: its caption, or the first of several.
            background: color behind transparent parts.
            further_captions: its other captions.
            mask: file of its mask.
            verify: decode the file now; False: only when its pixels are used.

        Raises:
            AntherError: the file can't be read as a picture.
        """
        self.path, self.caption, self.background = path, caption, background
        self.further_captions, self.mask_path = further_captions, mask
        self.sha256 = _hash_file(path)
        if verify and (self.sha256, background) not in _verified:
            self._read(side=1)
            _verified.add((self.sha256, background))
        if verify:
            self.mask()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, the first one first."""
        return (self.caption, *self.further_captions)

    @property
    def pixels(self) -> np.ndarray:
        """All pixels, decoded from the file."""
        return self._read(side=None)

    def at_least(self, side: int) -> np.ndarray:
        """Decode a copy with sides of at least twice `side` pixels, if the picture is that large."""
        return self._read(side=side)

    def mask(self) -> np.ndarray | None:
        """Read the mask, if there is one; AntherError if it can't be used."""
        if self.mask_path is None:
            return None
        from client.data.masks import read_mask

        return read_mask(self.mask_path, self.at_least(_MASK_SIDE))

    def content(self) -> Iterator[bytes]:
        """Yield the file's bytes in place of its pixels, so that comparing pictures needs no decoding."""
        yield repr(("file", self.sha256, self.background, *self.captions)).encode()

    def _read(self, side: int | None) -> np.ndarray:
        with open_picture(self.path) as file:
            if _digest(file, self.path) != self.sha256:
                raise AntherError(f"{self.path}: was changed after the folder was read; read it again")
            file.seek(0)
            return decode(self.path, file, background=self.background, side=side)


class MissingPicture(Picture):
    """Placeholder for a listed picture that can't be used; the positions of the other pictures don't change."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(np.zeros((0, 0), np.uint8), "")


def _hash_file(path: Path) -> str:
    with open_picture(path) as file:
        return _digest(file, path)


def _digest(file: object, path: Path) -> str:
    try:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise os_error(error, path) from error
