"""Draw strokes with a round pen: anti-aliased, 64 × 64 pixels, 16 gray levels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from typefaces.making.render import SIDE
from typefaces.making.unipen.format import Points

STEP = 0.25  # pixels between resampled points; the edge of the ink is then off by less than 0.01 pixels
SIGMA = 0.7  # pixels, smoothing along the stroke, which removes the steps of the digitizer
LEVELS = 16


def draw(strokes: Iterable[Points], width: float) -> NDArray[np.uint8]:
    """Draw a character.

    A pixel's ink is the part of it that the pen covers, approximated by the distance of its center from the center
    line: exact where the edge is straight and parallel to the pixels.

    Args:
        strokes: center lines [n, 2] in pixels, x to the right and y down; the image is [0, 64] × [0, 64].
        width: diameter of the pen in pixels.

    Returns:
        uint8 [64, 64], 0 = ink, 255 = paper.
    """
    radius, ink = width / 2, np.zeros((SIDE, SIDE))
    for stroke in strokes:
        line = smooth(stroke)
        # Only pixels that the pen can reach are compared with the line.
        low = np.clip(np.floor(line.min(axis=0) - radius - 1), 0, SIDE).astype(int)
        high = np.clip(np.ceil(line.max(axis=0) + radius + 1), 0, SIDE).astype(int)
        columns, rows = (np.arange(low[axis], high[axis]) + 0.5 for axis in (0, 1))
        x, y = (columns[:, None] - line[:, 0]) ** 2, (rows[:, None] - line[:, 1]) ** 2
        distances = np.sqrt((y[:, None, :] + x[None, :, :]).min(axis=2))
        covered = np.clip(radius + 0.5 - distances, 0, 1)
        window = ink[low[1] : high[1], low[0] : high[0]]
        np.maximum(window, covered, out=window)
    levels = np.rint((1 - ink) * (LEVELS - 1)).astype(np.uint8)
    return levels * np.uint8(255 // (LEVELS - 1))


def smooth(stroke: Points) -> Points:
    """Resample a stroke [n, 2] at equal steps and smooth it by a Gaussian; its ends stay in place."""
    steps = np.linalg.norm(np.diff(stroke, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    count = int(np.ceil(along[-1] / STEP)) + 1
    if count == 1:  # a dot
        return stroke[:1]
    places = np.linspace(0, along[-1], count)
    line = np.stack([np.interp(places, along, stroke[:, axis]) for axis in (0, 1)], axis=1)
    reach = int(np.ceil(3 * SIGMA / STEP))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * STEP / SIGMA) ** 2)
    kernel /= kernel.sum()
    # Odd reflection: the mean over both sides of an end is the end.
    extended = np.pad(line, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
    return np.stack([np.convolve(extended[:, axis], kernel, mode="valid") for axis in (0, 1)], axis=1)
