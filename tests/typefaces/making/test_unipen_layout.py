"""One scale and one baseline per person, measured on lines and inferred in boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.unipen import Box, form, line
from typefaces.dataset import GLYPHS
from typefaces.making.unipen.layout import PEN, Frame, fit, glyph_bottoms, in_pixels, measured_bottoms, place
from typefaces.making.unipen.strokes import WrittenGlyph

CAP = 5.0
LINES = (GLYPHS[:21], GLYPHS[21:42], GLYPHS[42:])


def person(written: list[tuple[str, Box]], donor: str = "aga") -> dict[str, list[WrittenGlyph]]:
    hand: dict[str, list[WrittenGlyph]] = {}
    for position, (glyph, box) in enumerate(written):
        stroke = np.array(box.points())
        each = WrittenGlyph(f"{donor}/anna", glyph, (stroke,), (Path("page"),), position, bad=False)
        hand.setdefault(glyph, []).append(each)
    return hand


def on_lines(slope: float = 0.0) -> list[tuple[str, Box]]:
    """Write all glyphs on three lines; slope is the rise in mm from one character to the next."""
    written = []
    for number, glyphs in enumerate(LINES):
        for index, (glyph, box) in enumerate(line(glyphs, cap=CAP, baseline=-12.0 * number)):
            written.append((glyph, Box(box.left, box.bottom + slope * index, box.width, box.height)))
    return written


def in_boxes() -> list[tuple[str, Box]]:
    """Write all glyphs in boxes, each at another height."""
    heights = np.random.default_rng(0).uniform(-2, 2, len(GLYPHS))
    return [
        (glyph, Box(box.left, box.bottom + height, box.width, box.height))
        for (glyph, box), height in zip(line(GLYPHS, cap=CAP), heights, strict=True)
    ]


def rows(strokes: tuple[np.ndarray, ...]) -> tuple[float, float]:
    """Return the upper and the lower end of the ink."""
    y = np.concatenate(strokes)[:, 1]
    return float(y.min()), float(y.max())


@pytest.mark.parametrize("slope", [0.0, 0.05])
def test_baselines_are_measured_on_lines(slope: float) -> None:
    """The neighbors are local: at the end of a line of 21, they are less than ten characters away."""
    measured = measured_bottoms(person(on_lines(slope)))
    assert set(measured) == set(GLYPHS)
    for glyph, bottom in measured.items():
        assert bottom == pytest.approx(form(glyph, 1.0)[2], abs=0.005 + 10 * slope / CAP)


def test_people_without_a_measurable_baseline() -> None:
    """Boxes have no common baseline, nor has a hand whose hanging glyphs don't hang, nor a page of three characters."""
    assert measured_bottoms(person(on_lines(), donor="tos")) == {}
    floating = [(glyph, Box(box.left, max(box.bottom, 0.0), box.width, box.height)) for glyph, box in line("abcdegpq")]
    assert measured_bottoms(person(floating)) == {}
    assert measured_bottoms(person(line("abc"))) == {}


def test_all_characters_share_scale_and_baseline() -> None:
    """Ascent 5 mm and descent 1.5 mm fill the 55.8 pixels that margins and the pen leave."""
    scale = (64 - 2 * 2 - PEN) / (1.3 * CAP)
    baseline = 2 + PEN / 2 + scale * CAP
    for glyph, (strokes,) in place(person(on_lines())).items():
        _, height, bottom = form(glyph, CAP)
        expected = (baseline - scale * (bottom + height), baseline - scale * bottom)
        assert rows(strokes) == pytest.approx(expected, abs=0.1)
        x = np.concatenate(strokes)[:, 0]
        assert (x.min() + x.max()) / 2 == pytest.approx(32)


def test_baselines_are_inferred_in_boxes() -> None:
    """Glyphs that can stand do; hanging ones have their tops at the x-height, and a j without a dot too."""
    hand = person(in_boxes(), donor="tos")
    bottoms = glyph_bottoms(hand)
    for glyph in GLYPHS:
        expected = (0.6 - 0.9) * CAP if glyph in "gjpqy" else 0.0
        assert bottoms[glyph] == pytest.approx(expected)
    lows = {round(rows(strokes)[1], 6) for glyph, (strokes,) in place(hand).items() if glyph not in "gjpqy"}
    assert len(lows) == 1


@pytest.mark.parametrize(
    ("glyph", "height", "strokes", "expected"),
    [
        ("f", 1.5, 1, -0.5),
        ("f", 1.1, 1, 0.0),
        ("z", 1.3, 1, 0.6 - 1.3),
        ("z", 0.6, 1, 0.0),
        ("J", 2.2, 1, -0.9),  # limited
        ("j", 1.3, 2, -0.3),  # the dot is as high as an i
        ("g", 0.6, 1, -0.12),  # limited
    ],
)
def test_inferred_forms(glyph: str, height: float, strokes: int, expected: float) -> None:
    hand = person(line(GLYPHS, cap=CAP), donor="tos")
    points = np.array(Box(0, 0, 2, height * CAP).points())
    parts = tuple(np.array_split(points, strokes))
    hand[glyph] = [WrittenGlyph("tos/anna", glyph, parts, (Path("page"),), 0, bad=False)]
    assert glyph_bottoms(hand)[glyph] == pytest.approx(expected * CAP)


def test_scale_is_limited_by_wide_glyphs() -> None:
    """The vertical space is then shared in equal parts."""
    hand = person([(glyph, Box(0, 0, 10.0 if glyph in "MW" else 3.0, 4.0)) for glyph in "ABDEMW"])
    scale, baseline = fit({glyph: each[0] for glyph, each in hand.items()}, dict.fromkeys(hand, 0.0))
    assert scale == pytest.approx((64 - 2 * 2 - PEN) / 10)
    assert baseline - scale * 4.0 == pytest.approx(64 - baseline - scale * 0.35 * 4.0)  # room for hanging glyphs


@pytest.mark.parametrize(
    ("width", "height", "bottom"), [(3.0, 9.0, 0.0), (3.0, 5.0, -4.5), (30.0, 5.0, 0.0), (3.0, 5.0, 0.0)]
)
def test_large_characters_are_shrunk_towards_the_baseline(width: float, height: float, bottom: float) -> None:
    frame = Frame(8.0, 45.0)
    (each,) = person([("A", Box(7.0, 3.0, width, height))])["A"]
    points = np.concatenate(in_pixels(each, bottom, frame))
    assert points.min() >= PEN / 2 + 0.5 - 1e-9
    assert points.max() <= 64 - PEN / 2 - 0.5 + 1e-9
    scale = np.ptp(points[:, 0]) / width
    assert np.ptp(points[:, 1]) == pytest.approx(scale * height)
    assert points[:, 1].max() == pytest.approx(45.0 - scale * bottom)
    assert (scale == pytest.approx(8.0)) == (width == 3.0 and height == 5.0 and bottom == 0.0)
