"""Characters of a distribution: labels, people, units, and files that are skipped."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from tests.helpers.unipen import add_page, line, put
from typefaces.making.unipen.distribution import extract, points_per_mm, writer
from typefaces.making.unipen.format import PenFile


def test_characters_of_a_page(tmp_path: Path) -> None:
    """Positions are in mm whatever the resolution of each axis."""
    written = line("7Ag")
    add_page(tmp_path, "aga", "anna", written)
    result = extract(tmp_path)
    assert [(each.person, each.glyph, each.position) for each in result.glyphs] == [
        ("aga/anna", "7", 0),
        ("aga/anna", "A", 1),
        ("aga/anna", "g", 2),
    ]
    for each, (_, box) in zip(result.glyphs, written, strict=True):
        assert np.allclose(each.strokes[0], box.points(), atol=0.026)  # half a point of 1/20 mm
        assert np.allclose(each.low, [box.left, box.bottom], atol=0.026)
        assert np.allclose(each.size, [box.width, box.height], atol=0.051)
    assert len({each.page for each in result.glyphs}) == 1
    assert not result.left_out
    assert not result.damaged


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"X_POINTS_PER_MM": "8", "Y_POINTS_PER_MM": "4"}, (8, 4)),
        ({"X_POINTS_PER_INCH": "254"}, (10, 10)),
        ({"X_POINTS_PER_INCH": "508 points", "Y_POINTS_PER_INCH": "254"}, (20, 10)),
        ({"X_POINTS_PER_MM": "5", "X_POINTS_PER_INCH": "254"}, (5, 5)),
        ({"X_POINTS_PER_MM": "0", "X_POINTS_PER_INCH": "?"}, (10, 10)),
        ({"Y_POINTS_PER_INCH": ""}, (10, 10)),
        ({}, (10, 10)),
    ],
)
def test_units(header: dict[str, str], expected: tuple[float, float]) -> None:
    assert points_per_mm(header) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("donor", "identifier", "other", "expected"),
    [
        ("aga", "anna", "", "aga/anna"),
        ("aga", "anna s 3", "Bo", "aga/anna"),
        ("imp", "xiao", "Ming L.", "imp/xiao.ming"),
        ("ceb", "gb2911", "", "cea/gb2911"),
        ("ceb", "gb2912", "", "ceb/gb2912"),
        ("kai", "text12Split", "", "kai/12"),
        ("aga", "", "", "aga/?"),
    ],
)
def test_people(donor: str, identifier: str, other: str, expected: str) -> None:
    assert writer(donor, PenFile(header={"WRITER_ID": identifier}, other_names=other)) == expected


INK = ".WRITER_ID bo\n.PEN_DOWN\n1 1\n2 9\n.PEN_DOWN\n5 5\n.PEN_DOWN\n1 x\n.PEN_UP\n3 3\n4 4\n"


@pytest.mark.parametrize(
    ("segment", "glyphs", "left_out"),
    [
        ('CHARACTER 0 OK "a"', ["a"], {}),
        ('WORD 0 ? "B"', ["B"], {}),
        ('WORD 0 OK "be"', [], {}),
        ('CHARACTER 0 OK "?"', [], {}),
        ('CHARACTER 0 OK "\xe9"', [], {}),
        ('LINE 0 OK "a"', [], {}),
        ("CHARACTER 0 OK", [], {"a statement that can't be read": 1}),
        ('CHARACTER 1 OK "a"', [], {"no ink": 1}),  # a single point has no size
        ('CHARACTER 3 OK "a"', [], {"no ink": 1}),
        ('CHARACTER 0-2 OK "a"', [], {"ink that can't be read": 1}),
        ('CHARACTER 4 OK "a"', [], {"ink that is absent": 1}),
        ('CHARACTER ? OK "a"', [], {"a delineation that can't be read": 1}),
    ],
)
def test_segments(tmp_path: Path, segment: str, glyphs: list[str], left_out: dict[str, int]) -> None:
    """A segment that can't be used is counted, and takes no other one with it."""
    put(tmp_path / "include/aga/bo.dat", INK)
    put(tmp_path / "data/1c/aga/bo.dat", f'.INCLUDE aga/bo.dat\n.SEGMENT {segment}\n.SEGMENT CHARACTER 0-1 BAD "z"\n')
    result = extract(tmp_path)
    assert [each.glyph for each in result.glyphs] == [*glyphs, "z"]
    assert result.left_out == left_out
    assert [each.bad for each in result.glyphs] == [False] * len(glyphs) + [True]


def test_single_characters_among_words(tmp_path: Path) -> None:
    """Words are searched in the folders of three donors only."""
    for donor in ("hpp", "aga"):
        put(tmp_path / "include" / donor / "cy.dat", INK)
        put(tmp_path / "data/7" / donor / "sub/cy.dat", f'.INCLUDE {donor}/cy.dat\n.SEGMENT WORD 0 OK "a"\n')
    assert [each.person for each in extract(tmp_path).glyphs] == ["hpp/bo"]


def test_damaged_files_are_skipped(tmp_path: Path) -> None:
    add_page(tmp_path, "aga", "anna", line("ab"))
    add_page(tmp_path, "aga", "bo", line("ab"), {"COORD": "X T"})
    put(tmp_path / "data/1c/aga/cy.dat", '.INCLUDE aga/gone.dat\n.SEGMENT CHARACTER 0 OK "a"\n')
    result = extract(tmp_path)
    assert [each.person for each in result.glyphs] == ["aga/anna", "aga/anna"]
    first, second = result.damaged
    assert first == f"{tmp_path}/include/aga/bo.dat: .COORD X T has no X and Y: restore the file"
    assert second.startswith(f"{tmp_path}/data/1c/aga/cy.dat: includes aga/gone.dat, which is absent")


PAGE = "\n".join((".WRITER_ID bo", ".COORD X Y", ".PEN_DOWN", "1 2", "3 4", '.SEGMENT CHARACTER 0:0-0:1 OK "b"', ""))


@given(
    place=st.integers(0, len(PAGE)),
    length=st.integers(0, 20),
    garbage=st.text(alphabet='.-:0 1\n\r\0"XYae\xff', max_size=9),
)
def test_any_damage_leaves_other_files(place: int, length: int, garbage: str) -> None:
    """Text in a file is cut out and replaced: the file may be read or skipped, the other one is read."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        add_page(root, "aga", "anna", line("b"))
        put(root / "data/1a/aga/bo.dat", PAGE[:place] + garbage + PAGE[place + length :])
        result = extract(root)
    assert [each.glyph for each in result.glyphs if each.person == "aga/anna"] == ["b"]
    assert len(result.glyphs) + len(result.damaged) <= 2


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="has no folders data and include: name the unpacked folder"):
        extract(tmp_path)
