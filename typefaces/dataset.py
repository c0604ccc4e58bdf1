"""The typefaces data set: families of 62 glyph images, each with one role, and the split within a writer.

*Public* families train the base and the judge. A *writer*, of role development or test, is the private typeface of one
device. Its glyphs are split into a few for training, some for early stopping, and the others for evaluation.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from models.files import assets

GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MERGED = ("O0o", "Il1", "Cc", "Kk", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Zz")  # differ only in size, or not at all
ROLES = ("public", "development", "test")
GLYPH_KINDS = (GLYPHS[:10], GLYPHS[10:36], GLYPHS[36:])  # digits, capital and lowercase letters
POOL, VALIDATION, TEST = 20, 10, 32  # glyphs of a writer: training pool, early stopping, evaluation
FILE = Path(__file__).parent / "data" / "typefaces.parquet"


@dataclass(frozen=True)
class Typeface:
    """Typeface of a public family or of one writer."""

    name: str
    role: str  # public | development | test
    kind: str  # text | hand | individual
    designer: str
    package: str  # Debian package of the font
    licence: str
    design: str  # shared by families of one design, which never have two roles
    order: tuple[int, ...]  # permutation of range(62) that determines the split within the writer
    glyphs: tuple[bytes, ...]  # 4-bit PNG in the order of GLYPHS

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """Images [62, 64, 64] in the order of GLYPHS, 0 = ink, 255 = paper; decoded when they are first used."""
        return np.stack([decode(glyph) for glyph in self.glyphs])


@dataclass(frozen=True)
class Split:
    """Indices into GLYPHS, disjoint."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def caption(glyph: str) -> str:
    """Return the caption of a glyph: "digit 7", "capital letter A", "lowercase letter a"."""
    if len(glyph) != 1 or glyph not in GLYPHS:
        raise ValueError(f"{glyph!r} is not one of the glyphs {GLYPHS}")
    if glyph.isdigit():
        return f"digit {glyph}"
    return f"{'capital' if glyph.isupper() else 'lowercase'} letter {glyph}"


def split(order: Sequence[int], train: int = 5) -> Split:
    """Split an order: the first `train` glyphs for training, the last 32 for test, the 10 before those for validation.

    Smaller training sets are prefixes of larger ones; validation and test don't depend on `train`.
    """
    if not 1 <= train <= POOL:
        raise ValueError(f"train={train}: must be 1 to {POOL} glyphs per writer")
    if sorted(order) != list(range(len(GLYPHS))):
        raise ValueError(f"order must be a permutation of 0 to {len(GLYPHS) - 1}")
    return Split(
        train=tuple(order[:train]),
        validation=tuple(order[POOL : POOL + VALIDATION]),
        test=tuple(order[POOL + VALIDATION :]),
    )


def skew_order(order: Sequence[int], kind: str) -> tuple[int, ...]:
    """Move glyphs of one of `GLYPH_KINDS` to the front of the training pool; validation and test don't change."""
    pool = sorted(order[:POOL], key=lambda glyph: GLYPHS[glyph] not in kind)  # stable
    return (*pool, *order[POOL:])


def load(role: str | None = None, path: Path | None = None) -> list[Typeface]:
    """Load the families of a role (default: all roles), sorted by name."""
    if role is not None and role not in ROLES:
        raise ValueError(f"role={role}: must be one of: {', '.join(ROLES)}")
    with pq.ParquetFile(path or FILE) as file:  # read_table imports pyarrow.compute, which takes half a second
        rows = [row for row in file.read().to_pylist() if role in (None, row["role"])]
    families = [
        Typeface(
            **{key: row[key] for key in ("name", "role", "kind", "designer", "package", "licence", "design")},
            order=tuple(row["order"]),
            glyphs=tuple(row["glyphs"]),
        )
        for row in rows
    ]
    return sorted(families, key=lambda family: family.name)


def decode(glyph: bytes) -> NDArray[np.uint8]:
    """Decode a 4-bit PNG to uint8 [64, 64]."""
    with Image.open(io.BytesIO(glyph)) as image:
        return np.array(image.convert("L"), dtype=np.uint8)


def digest(path: Path | None = None) -> str:
    """Return the SHA-256 of the data file, which is recorded with results."""
    return assets.digest(path or FILE)
