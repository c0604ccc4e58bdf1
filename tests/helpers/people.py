"""Small Parquet files of people's characters, in the image convention of Hugging Face `datasets`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.seeding import derive_seed
from typefaces.dataset import GLYPHS, caption

Row = dict[str, Any]


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def character(person: str, glyph: str, sample: int = 0, **columns: object) -> Row:
    """Return the row of one character, with pixels of its own."""
    rng = np.random.default_rng(derive_seed(person, glyph, sample))
    image = {"bytes": png(rng.integers(0, 256, (64, 64), np.uint8)), "path": None}
    return {"person": person, "text": caption(glyph), "image": image, **columns}


def characters(people: Iterable[str], glyphs: str = GLYPHS[:20], **columns: object) -> list[Row]:
    """Return the rows of people who each wrote these characters once."""
    return [character(person, glyph, **columns) for person in people for glyph in glyphs]


def write(file: Path, rows: Sequence[Mapping[str, Any]], *, row_group_size: int | None = None) -> Path:
    """Write rows to a Parquet file.

    Args:
        file: its path.
        rows: its rows.
        row_group_size: rows in a row group; None: all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
    return file
