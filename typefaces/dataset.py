"""The typefaces data set: families of 62 glyph pictures, each in one role, and the split within a writer.

A *public* family trains the base and the judge. A *writer*, development or test, is one device's private hand:
its glyphs are split into a few to train on, some to decide when to stop, and the rest to measure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from models.base import assets

GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MERGED = ("O0o", "Il1", "Cc", "Kk", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Zz")  # differ in size only, or coincide
ROLES = ("public", "development", "test")
GLYPH_KINDS = (GLYPHS[:10], GLYPHS[10:36], GLYPHS[36:])  # digits, capital and lowercase letters
POOL, VALIDATION, TEST = 20, 10, 32  # glyphs of a writer that may train, that stop, and that measure
FILE = Path(__file__).parent / "data" / "typefaces.parquet"


@dataclass(frozen=True)
class Typeface:
    """One typeface: a public family, or the hand of one writer."""

    name: str
    role: str  # public | development | test
    kind: str  # text | hand | individual
    designer: str
    package: str  # the Debian package that its font comes from
    licence: str
    design: str  # families of one design share this id, and never stand in two roles
    order: tuple[int, ...]  # permutation of range(62) that fixes the split within the writer
    images: NDArray[np.uint8]  # [62, 64, 64] in the order of GLYPHS, 0 = ink, 255 = paper


@dataclass(frozen=True)
class Split:
    """Indices into GLYPHS, disjoint."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def caption(glyph: str) -> str:
    """What a prompt calls a glyph: "digit 7", "capital letter A", "lowercase letter a"."""
    if len(glyph) != 1 or glyph not in GLYPHS:
        raise ValueError(f"{glyph!r} is not one of the glyphs {GLYPHS}")
    if glyph.isdigit():
        return f"digit {glyph}"
    return f"{'capital' if glyph.isupper() else 'lowercase'} letter {glyph}"


def split(order: Sequence[int], train: int = 5) -> Split:
    """The first `train` glyphs of the order train, the last 32 test, the 10 before them validate.

    Fewer train glyphs are a prefix of more, and validation and test are the same for every `train`.
    """
    if not 1 <= train <= POOL:
        raise ValueError(f"train={train}: a writer gives 1 to {POOL} glyphs to training")
    if sorted(order) != list(range(len(GLYPHS))):
        raise ValueError(f"order must be a permutation of 0 to {len(GLYPHS) - 1}")
    return Split(
        train=tuple(order[:train]),
        validation=tuple(order[POOL : POOL + VALIDATION]),
        test=tuple(order[POOL + VALIDATION :]),
    )


def skew_order(order: Sequence[int], kind: str) -> tuple[int, ...]:
    """The order with glyphs of one of `GLYPH_KINDS` first among those that may train: the same validate and test."""
    pool = sorted(order[:POOL], key=lambda glyph: GLYPHS[glyph] not in kind)  # stable
    return (*pool, *order[POOL:])


def load(role: str | None = None, path: Path | None = None) -> list[Typeface]:
    """The families of a role (default: of all roles), sorted by name; only their pictures are decoded."""
    if role is not None and role not in ROLES:
        raise ValueError(f"role={role}: must be one of: {', '.join(ROLES)}")
    rows = pq.read_table(path or FILE, filters=None if role is None else [("role", "=", role)]).to_pylist()
    families = [
        Typeface(
            **{key: row[key] for key in ("name", "role", "kind", "designer", "package", "licence", "design")},
            order=tuple(row["order"]),
            images=np.stack([decode(glyph) for glyph in row["glyphs"]]),
        )
        for row in rows
    ]
    return sorted(families, key=lambda family: family.name)


def decode(glyph: bytes) -> NDArray[np.uint8]:
    """A 4-bit PNG as uint8 [64, 64]."""
    with Image.open(io.BytesIO(glyph)) as image:
        return np.array(image.convert("L"), dtype=np.uint8)


def digest(path: Path | None = None) -> str:
    """The SHA-256 of the file: what a result says it was measured on."""
    return assets.digest(path or FILE)
