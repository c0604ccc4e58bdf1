"""Characters are selected by geometry: duplicates, spikes and broken segments go, the cleanest comes first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.unipen import Box, form
from typefaces.dataset import GLYPHS
from typefaces.making.unipen.strokes import (
    UsualShape,
    WrittenGlyph,
    broken,
    by_person,
    cap_height,
    cleanest,
    usual_shapes,
    without_spikes,
)


def write(glyph: str, width: float, height: float, *, person: str = "aga/anna", position: int = 0) -> WrittenGlyph:
    stroke = np.array(Box(0.0, 0.0, width, height).points())
    return WrittenGlyph(person, glyph, (stroke,), (Path("page"),), position, bad=False)


def hand(cap: float) -> dict[str, list[WrittenGlyph]]:
    return {glyph: [write(glyph, *form(glyph, cap)[:2])] for glyph in GLYPHS}


def test_repeated_ink_counts_once() -> None:
    """The same ink may have other labels or other people, and other ink the same label."""
    one, other = write("a", 2, 3), write("a", 2, 3.1)
    people = by_person([one, replace(one, position=7), other, replace(one, glyph="A"), replace(one, person="b/c")])
    assert {person: {glyph: len(each) for glyph, each in glyphs.items()} for person, glyphs in people.items()} == {
        "aga/anna": {"a": 2, "A": 1},
        "b/c": {"a": 1},
    }


def test_spikes_are_removed() -> None:
    steps = np.stack([np.arange(20.0), np.zeros(20)], axis=1)
    spiked = steps.copy()
    spiked[9, 1] = 80.0
    assert (without_spikes(spiked) == np.delete(steps, 9, axis=0)).all()
    (cleaned,) = by_person([replace(write("a", 1, 1), strokes=(spiked,))])["aga/anna"]["a"]
    assert cleaned.height == 0


@pytest.mark.parametrize(
    "stroke",
    [
        [[0, 0], [1, 0], [2, 40], [3, 80], [4, 120], [4, 121], [4, 122]],  # a fast upstroke
        [[0, 0], [1, 0], [2, 0], [3, 0], [60, 0]],  # ends aren't judged
        [[5, 5], [5, 5], [5, 5]],
        [[0, 0], [90, 90]],
    ],
)
def test_other_strokes_are_kept(stroke: list[list[int]]) -> None:
    points = np.array(stroke, np.float64)
    assert without_spikes(points) is points or (without_spikes(points) == points).all()


def test_cap_height() -> None:
    assert cap_height(hand(6.0)) == pytest.approx(6.0)
    assert cap_height({"a": [write("a", 2, 3.0)], "c": [write("c", 2, 3.2)]}) == pytest.approx(1.4 * 3.1)


def test_usual_shapes_are_relative_to_each_person() -> None:
    shapes = usual_shapes([hand(4.0), hand(8.0), hand(20.0)])
    assert shapes["A"] == pytest.approx((0.6, 1.0))
    assert shapes["a"] == pytest.approx((0.5, 0.6))


def test_flat_ink_spoils_nothing() -> None:
    """A person whose characters have no height has none left, and other people keep their sizes."""
    flat = {glyph: [write(glyph, 3.0, 0.0)] for glyph in GLYPHS}
    shapes = usual_shapes([hand(4.0), hand(5.0), flat])
    assert shapes["A"] == pytest.approx((0.6, 1.0))
    assert cleanest(flat, shapes) == {}


def test_cleanest_first() -> None:
    """The reference is the person's own form from three samples on, with fewer that of all people."""
    usual = usual_shapes([hand(5.0)])
    own = [write("a", *size, position=n) for n, size in enumerate([(2.5, 3.0), (4.0, 3.6), (4.1, 3.7), (4.2, 3.8)])]
    clean = cleanest(hand(5.0) | {"a": own}, usual)["a"]
    assert clean[0] in own[1:3]
    assert clean[-1] is own[0]
    assert cleanest(hand(5.0) | {"a": own[:2]}, usual)["a"] == own[:2]


def test_number_of_strokes_and_quality_count() -> None:
    usual = usual_shapes([hand(5.0)])
    plain = [write("t", 3, 5, position=n) for n in range(4)]
    split = replace(plain[0], strokes=(plain[0].strokes[0][:10], plain[0].strokes[0][10:]))
    bad = replace(plain[1], bad=True)
    assert cleanest(hand(5.0) | {"t": [split, bad, *plain[2:]]}, usual)["t"] == [*plain[2:], bad, split]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (0.6, 1.0, False),
        (0.05, 1.0, False),
        (0.2, 0.2, True),  # a dot
        (2.7, 1.0, True),  # a word
        (1.4, 1.0, True),  # two characters
        (1.3, 1.0, False),
        (0.6, 0.39, True),  # a part
        (0.6, 2.2, True),  # two lines
        (0.6, 2.0, False),
    ],
)
def test_broken_segments(width: float, height: float, expected: bool) -> None:
    assert broken(write("A", 5 * width, 5 * height), UsualShape(0.6, 1.0), 5.0) == expected


def test_glyphs_without_samples_are_dropped() -> None:
    clean = cleanest(hand(5.0) | {"Q": [write("Q", 1, 1)]}, usual_shapes([hand(5.0)]))
    assert set(GLYPHS) - set(clean) == {"Q"}
