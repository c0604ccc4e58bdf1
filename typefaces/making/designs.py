"""Similarity of families by their images, so that one design never has two roles under two names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 16  # each glyph's ink box is resampled to 16 × 16, which removes size, position and much of the weight
INK = 60  # of 255: threshold for the ink box
LIMIT = 0.87  # different book faces reach 0.86; cuts and clones of one design exceed it


def features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Map a family's images [62, 64, 64] to one unit vector, in which all glyphs have equal weight."""
    glyphs = np.stack([glyph(255 - image) for image in images])
    return (glyphs / np.sqrt(len(glyphs))).ravel()


def glyph(ink: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return one glyph's ink box, resampled, centered and normalized: [16, 16]."""
    rows, columns = np.flatnonzero(ink.max(axis=1) > INK), np.flatnonzero(ink.max(axis=0) > INK)
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    values = np.asarray(Image.fromarray(box).resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32)
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def leaks(
    names: Sequence[str], roles: Sequence[str], designs: Sequence[str], images: Sequence[NDArray[np.uint8]]
) -> list[str]:
    """Return pairs of a writer and a similar public family or other writer, which may have the same design.

    Args:
        names: names of families.
        roles: role of each family.
        designs: design of each family.
        images: uint8 [62, 64, 64] per family.
    """
    vectors = np.stack([features(family) for family in images])
    similarity = np.triu(vectors @ vectors.T, k=1)
    return [
        f"{names[a]} ({roles[a]}) and {names[b]} ({roles[b]}): similarity {similarity[a, b]:.3f}"
        for a, b in zip(*np.nonzero(similarity > LIMIT), strict=True)
        if not roles[a] == roles[b] == "public" and designs[a] != designs[b]
    ]
