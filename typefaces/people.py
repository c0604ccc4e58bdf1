"""Handwriting of people: a Parquet file (`typefaces.picture_table`) whose pictures are characters of 64 × 64 pixels.

The column `role` splits people into disjoint groups.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from common.errors import AntherError
from typefaces.dataset import GLYPHS, caption
from typefaces.picture_table import ROLE, PictureRow, StoredImage, read_images, read_rows

CLASSES = {caption(glyph): index for index, glyph in enumerate(GLYPHS)}
"""Class of each caption, an index into GLYPHS."""
SIDE = 64


@dataclass(frozen=True)
class Hand:
    """Characters that one person wrote."""

    person: str
    classes: NDArray[np.int64]
    """What each picture shows [n], indices into GLYPHS."""
    images: NDArray[np.uint8]
    """Pictures [n, 64, 64], 0 = ink, 255 = paper."""


def load(file: Path, *, role: str) -> list[Hand]:
    """Load the people of a role, sorted by name.

    Args:
        file: the Parquet file.
        role: value of the column `role`.

    Raises:
        AntherError: the file can't be read, has no such people, or a picture isn't a character of 64 × 64 pixels.
    """
    rows = [row for row in read_rows(file, required=[ROLE]) if row.role == role]
    if not rows:
        raise AntherError(f"{file}: no person has role={role}")
    people: dict[str, list[tuple[int, NDArray[np.uint8]]]] = {}
    for row, image in read_images(rows):
        people.setdefault(row.person, []).append(_character(row, image))
    return [
        Hand(
            person,
            np.array([number for number, _ in characters], np.int64),
            np.stack([image for _, image in characters]),
        )
        for person, characters in sorted(people.items())
    ]


def _character(row: PictureRow, stored: StoredImage) -> tuple[int, NDArray[np.uint8]]:
    """Return class and picture of a row."""
    who = f"{row.file}: {row.person}, {row.text!r}"
    if (number := CLASSES.get(row.text or "")) is None:
        raise AntherError(f'{who}: not a caption of a character, such as "lowercase letter a"')
    try:
        with Image.open(io.BytesIO(stored.data or b"")) as image:
            pixels = np.array(image.convert("L"), dtype=np.uint8)
    except (OSError, UnidentifiedImageError) as error:
        raise AntherError(f"{who}: the picture can't be read ({error})") from error
    if pixels.shape != (SIDE, SIDE):
        raise AntherError(f"{who}: the picture has {pixels.shape[1]} × {pixels.shape[0]} pixels, not {SIDE} × {SIDE}")
    return number, pixels
