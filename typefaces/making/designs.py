"""Likeness of families by their pictures, so that one design never stands in two roles under two names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 16  # each glyph's ink box is resampled to 16 × 16: size, place and much of the weight drop out
INK = 60  # of 255, what counts as ink when the box is drawn
LIMIT = 0.87  # ordinary book faces reach 0.86 among themselves; cuts and clones of one design lie above


def features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A family's pictures [62, 64, 64] as one unit vector: each glyph counts the same, however heavy."""
    glyphs = np.stack([glyph(255 - image) for image in images])
    return (glyphs / np.sqrt(len(glyphs))).ravel()


def glyph(ink: NDArray[np.uint8]) -> NDArray[np.float32]:
    """One glyph's ink box, resampled, centred and normalised."""
    rows, columns = np.flatnonzero(ink.max(axis=1) > INK), np.flatnonzero(ink.max(axis=0) > INK)
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    values = np.asarray(Image.fromarray(box).resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32)
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def leaks(
    names: Sequence[str], roles: Sequence[str], designs: Sequence[str], images: Sequence[NDArray[np.uint8]]
) -> list[str]:
    """Pairs that look like one design although one is a writer and the other is public or another writer."""
    vectors = np.stack([features(family) for family in images])
    likeness = np.triu(vectors @ vectors.T, k=1)
    return [
        f"{names[a]} ({roles[a]}) and {names[b]} ({roles[b]}): likeness {likeness[a, b]:.3f}"
        for a, b in zip(*np.nonzero(likeness > LIMIT), strict=True)
        if not roles[a] == roles[b] == "public" and designs[a] != designs[b]
    ]
