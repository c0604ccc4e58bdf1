"""Pictures of strokes match the area that a round pen covers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from typefaces.making.unipen.layout import PEN
from typefaces.making.unipen.render import draw, smooth


def ink(image: np.ndarray) -> np.ndarray:
    return 1 - image / 255


def disc_area(radius: float) -> float:
    return math.pi * radius**2


def test_paper_and_levels() -> None:
    assert (draw([], PEN) == 255).all()
    image = draw([np.array([[5.0, 5.0], [59.0, 51.3]]), np.array([[4.3, 60.0], [58.0, 57.0]])], PEN)
    assert image.shape == (64, 64)
    assert image.dtype == np.uint8
    assert set(np.unique(image)) == set(range(0, 256, 17))


def test_horizontal_stroke() -> None:
    """A column through the stroke is full from 29.8 to 34.2, with pixel edges at whole numbers."""
    image = draw([np.array([[10.0, 32.0], [50.0, 32.0]])], 4.4)
    expected = np.full(64, 255)
    expected[[29, 34]] = 255 - 3 * 17  # a fifth of these pixels is covered
    expected[30:34] = 0
    assert (image[:, 30] == expected).all()
    assert (image[:, :7] == 255).all()
    assert (image[:, 53:] == 255).all()


@pytest.mark.parametrize(("x0", "y0", "x1", "y1"), [(10, 32, 50, 32), (20.3, 9.1, 41.7, 52.2), (8, 8, 56, 56)])
def test_area_of_straight_strokes(x0: float, y0: float, x1: float, y1: float) -> None:
    """The area is that of a rectangle and two half discs."""
    area = math.hypot(x1 - x0, y1 - y0) * PEN + disc_area(PEN / 2)
    assert ink(draw([np.array([[x0, y0], [x1, y1]])], PEN)).sum() == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("points", [1, 3])
def test_dots(points: int) -> None:
    image = draw([np.full((points, 2), 20.5)], 7.0)
    assert ink(image).sum() == pytest.approx(disc_area(3.5), rel=0.03)
    assert (image == image.T).all()


def test_ring() -> None:
    angles = np.linspace(0, 2 * np.pi, 200)
    circle = 32 + 18 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert ink(draw([circle], PEN)).sum() == pytest.approx(2 * math.pi * 18 * PEN, rel=0.02)


def test_crossing_strokes_are_one_ink() -> None:
    """Overlaps count once, and strokes may lie partly outside the image."""
    level, upright = np.array([[0.0, 32.0], [64.0, 32.0]]), np.array([[32.0, 0.0], [32.0, 64.0]])
    area = ink(draw([level, upright, level], 4.0)).sum()
    assert area == pytest.approx(2 * 64 * 4 - 4 * 4, rel=0.01)
    assert (draw([level + np.array([0, 100])], 4.0) == 255).all()


def test_smoothing_keeps_straight_lines_and_ends() -> None:
    line = np.array([[3.0, 4.0], [10.0, 11.0], [40.0, 41.0]])
    smoothed = smooth(line)
    assert np.allclose(smoothed[[0, -1]], line[[0, -1]])
    assert np.allclose(smoothed[:, 1] - smoothed[:, 0], 1)
    assert np.allclose(np.diff(smoothed, axis=0), np.diff(smoothed, axis=0)[0])


def test_smoothing_removes_steps_of_the_digitizer() -> None:
    x = np.linspace(10, 50, 161)
    stairs = np.stack([x, 30 + 0.5 * (np.arange(161) % 2)], axis=1)
    assert np.abs(smooth(stairs)[16:-16, 1] - 30.25).max() < 0.05


def test_ink_matches_dense_sampling() -> None:
    """Each pixel is covered as far as 8 × 8 points in it are within the pen's radius of the center line."""
    lines = np.array([[[10.0, 50.0], [30.0, 12.0]], [[39.5, 17.0], [52.0, 40.0]]])
    image = draw(lines, 6.0)
    fine = (np.arange(64 * 8) + 0.5) / 8
    inside = np.zeros((64 * 8, 64 * 8), dtype=bool)
    for start, end in lines:
        along = (end - start) / np.linalg.norm(end - start)
        x, y = fine[None, :] - start[0], fine[:, None] - start[1]
        share = np.clip(x * along[0] + y * along[1], 0, np.linalg.norm(end - start))
        inside |= np.hypot(x - share * along[0], y - share * along[1]) <= 3.0
    covered = inside.reshape(64, 8, 64, 8).mean(axis=(1, 3))
    assert np.abs(ink(image) - covered).max() < 0.14
    assert np.abs(ink(image) - covered).mean() < 0.005
