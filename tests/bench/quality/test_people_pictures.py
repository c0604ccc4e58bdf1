"""Tests of the scores of drawn letters, on styles and readings that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.quality.people_pictures import ARMS, read_rate, real_style, write_sheet
from simulations.evaluation import Gallery
from typefaces.dataset import GLYPHS, MERGED


def unit(*rows: tuple[float, float]) -> np.ndarray:
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_letters_of_one_shape_count_as_read() -> None:
    first, second = (GLYPHS.index(glyph) for glyph in MERGED[0][:2])
    other = next(index for index, glyph in enumerate(GLYPHS) if all(glyph not in group for group in MERGED))
    assert read_rate([first, second, other, other], [second, second, other, first]) == pytest.approx(0.75)


def test_real_letters_are_compared_with_the_person_s_other_letters() -> None:
    """The third letter resembles the other person: with itself among the own letters it would match."""
    own, other = unit((1, 0), (1, 0.1), (0, 1)), [unit((0.1, 1))]
    assert real_style(own, other) == pytest.approx(2 / 3)


def test_sheet_shows_drawings_only(tmp_path: Path) -> None:
    """Real letters are black here, and drawings are of three grays."""
    gray = dict(zip(ARMS, (0, 90, 120, 150), strict=True))
    galleries = {
        f"person-{index}": Gallery(
            ("a",) * 7, {arm: np.full((7, 64, 64), value, np.uint8) for arm, value in gray.items()}
        )
        for index in range(8)
    }
    write_sheet(tmp_path / "docs" / "sheet.png", galleries)
    pixels = np.asarray(Image.open(tmp_path / "docs" / "sheet.png"))
    assert pixels.shape == (6 * 64, 3 * 5 * 64 + 2 * 16)
    assert set(np.unique(pixels)) == {90, 120, 150, 255}
