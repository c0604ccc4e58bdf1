"""Compare center lines with scipy, and drawn strokes with their geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Generator

from typefaces import dataset
from typefaces.pretraining.corpus import pictures
from typefaces.pretraining.pen import PENS, REACH, center_lines, distance, draw, draw_radii, thin
from typefaces.strokes import normalize

EIGHT = np.ones((3, 3))


@pytest.fixture(scope="module")
def glyphs() -> torch.Tensor:
    return pictures(dataset.load("public")[:1])[10:40:6]


def test_distance_is_scipys() -> None:
    mask = torch.rand(3, 1, 20, 17, generator=Generator().manual_seed(0)) < 0.03
    mask[0] = False
    for reach in (3, 30):
        for image, got in zip(mask[:, 0].numpy(), distance(mask, reach)[:, 0].numpy(), strict=True):
            exact = ndimage.distance_transform_edt(~image) if image.any() else np.full(image.shape, np.inf)
            assert np.allclose(got, np.minimum(exact, reach), atol=1e-5)


def test_lines_are_thin_and_connected(glyphs: torch.Tensor) -> None:
    ink = glyphs < 128
    for stroke, line in zip(ink[:, 0].numpy(), thin(ink)[:, 0].numpy(), strict=True):
        assert (line <= stroke).all()
        assert ndimage.label(line, EIGHT)[1] == ndimage.label(stroke, EIGHT)[1]
        holes = [ndimage.label(~image)[1] for image in (line, stroke)]
        assert holes[0] == holes[1]
        assert not ndimage.binary_erosion(line, np.ones((2, 2))).any()  # no square of ink is left


def test_bar_becomes_its_middle() -> None:
    ink = torch.zeros(1, 1, 15, 40, dtype=torch.bool)
    ink[..., 5:10, 5:35] = True
    rows, columns = thin(ink)[0, 0].nonzero(as_tuple=True)
    assert set(rows.tolist()) == {7}
    assert len(columns) >= 24


def test_empty_and_full_pictures() -> None:
    blank = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    assert (center_lines(blank) == 255).all()
    assert center_lines(torch.zeros_like(blank)).min() < 40


def test_pen_has_its_width() -> None:
    """A vertical stroke has twice the radius in ink in each row."""
    bar = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    bar[..., 10:54, 30:34] = 0
    nearness = normalize(center_lines(bar)).repeat(3, 1, 1, 1)
    radius = torch.tensor([1.0, 2.1, 3.2])
    drawn = draw(nearness, radius)
    assert drawn.min() >= -1
    assert drawn.max() <= 1
    ink = ((1 - drawn[:, 0, 32]) / 2).sum(1)
    assert torch.allclose(ink, 2 * radius, atol=0.6)
    assert (ink.diff() > 1.5).all()


def test_drawn_glyph_covers_its_lines(glyphs: torch.Tensor) -> None:
    nearness = center_lines(glyphs)
    drawn = draw(normalize(nearness), torch.full((len(glyphs),), 2.0))
    assert (drawn[nearness.float() / 255 * REACH < 1.4] == -1).all()
    assert (drawn[nearness.float() / 255 * REACH > 2.6] == 1).all()


def test_radii() -> None:
    radii = draw_radii(4000, Generator().manual_seed(0))
    assert radii.min() >= PENS[0]
    assert radii.max() <= PENS[1]
    assert float(radii.mean()) == pytest.approx(sum(PENS) / 2, abs=0.05)
