"""Handwriting of people: a Parquet file with one row for each picture.

Columns, as in the image convention of Hugging Face `datasets`: `person`; `role`, which splits people into disjoint
groups; `text`, the caption; `image`, a struct with the `bytes` of a file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from common.errors import AntherError
from typefaces.dataset import GLYPHS, caption

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
    rows = [row for row in _rows(file) if row["role"] == role]
    if not rows:
        raise AntherError(f"{file}: no person has role={role}")
    people: dict[str, list[tuple[int, NDArray[np.uint8]]]] = {}
    for row in rows:
        people.setdefault(row["person"], []).append(_character(file, row))
    return [
        Hand(
            person,
            np.array([number for number, _ in characters], np.int64),
            np.stack([image for _, image in characters]),
        )
        for person, characters in sorted(people.items())
    ]


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    try:
        table = pq.read_table(file, columns=["person", "role", "text", "image"])
    except (OSError, pa.ArrowException) as error:
        raise AntherError(f"{file}: can't be read as Parquet with person, role, text and image ({error})") from error
    return table.to_pylist()


def _character(file: Path, row: dict[str, Any]) -> tuple[int, NDArray[np.uint8]]:
    """Return class and picture of a row."""
    who = f"{file}: {row['person']}, {row['text']!r}"
    if (number := CLASSES.get(row["text"])) is None:
        raise AntherError(f'{who}: not a caption of a character, such as "lowercase letter a"')
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            pixels = np.array(image.convert("L"), dtype=np.uint8)
    except (OSError, TypeError, KeyError, UnidentifiedImageError) as error:
        raise AntherError(f"{who}: the picture can't be read ({error})") from error
    if pixels.shape != (SIDE, SIDE):
        raise AntherError(f"{who}: the picture has {pixels.shape[1]} × {pixels.shape[0]} pixels, not {SIDE} × {SIDE}")
    return number, pixels
