"""Files in the UNIPEN format are read as its definition says, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import AntherError
from tests.helpers.unipen import put
from typefaces.making.unipen.format import PenComponent, PenFile, delineate, read


def parse(folder: Path, text: str) -> PenFile:
    (folder / "include").mkdir(exist_ok=True)
    return read(put(folder / "page.dat", text), folder / "include")


def positions(file: PenFile) -> list[object]:
    return [None if part.points is None else part.points.tolist() for part in file.components]


def test_columns_in_any_order(tmp_path: Path) -> None:
    """Columns other than X and Y may hold anything."""
    file = parse(tmp_path, ".COORD T Y P X\n.PEN_DOWN\n0 20 ? 10\n5 22 900 11\n")
    assert positions(file) == [[[10, 20], [11, 22]]]


def test_columns_default_to_x_and_y(tmp_path: Path) -> None:
    assert positions(parse(tmp_path, ".PEN_DOWN\n1 2\n-3 4e1\n")) == [[[1, 2], [-3, 40]]]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_endings_and_encoding(tmp_path: Path, newline: str) -> None:
    lines = (".WRITER_ID Bj\xf6rn", ".PEN_DOWN", "1 2", "3 4", ".DT 10", '.SEGMENT CHARACTER 0 OK "a"', "")
    file = parse(tmp_path, newline.join(lines))
    assert file.header["WRITER_ID"] == "Bj\xf6rn"
    assert positions(file) == [[[1, 2], [3, 4]]]
    assert [tuple(segment) for segment in file.segments] == [("CHARACTER", "0", "OK", "a")]


def test_statements_continue_until_the_next_keyword(tmp_path: Path) -> None:
    """Comments may hold numbers, and coordinates may start with a decimal point."""
    text = (
        "preface 1 2\n.COMMENT ##\n 7 8\n . no keyword\nOther Names: Anna B\nmore\n"
        '.PEN_DOWN 1 2\n.5 3\n.SEGMENT CHARACTER\n 0 ?\n "b"\n'
    )
    file = parse(tmp_path, text)
    assert positions(file) == [[[1, 2], [0.5, 3]]]
    assert file.segments[0].label == "b"
    assert file.other_names == "Anna B"


def test_components_are_numbered(tmp_path: Path) -> None:
    """An empty .PEN_UP has no number, an empty .PEN_DOWN has one."""
    text = ".PEN_DOWN\n1 1\n.PEN_UP\n.PEN_DOWN\n.PEN_UP\n2 2\n.DT 5\n.START_BOX\n.PEN_DOWN\n3 3\n"
    file = parse(tmp_path, text)
    assert [part.down for part in file.components] == [True, True, False, True]
    assert positions(file) == [[[1, 1]], [], [[2, 2]], [[3, 3]]]


def test_included_files(tmp_path: Path) -> None:
    """Ink is numbered through all included files; columns stay declared; absent documentation is no damage."""
    put(tmp_path / "include/a/head.dat", ".COORD Y X\n.INCLUDE words.lex\n")
    put(tmp_path / "include/a/ink.dat", ".PEN_DOWN\n1 2\n")
    put(tmp_path / "include/words.lex", '.LEXICON "a" "b"\n.PEN_DOWN\n9 9\n')
    put(tmp_path / "more.dat", ".PEN_DOWN\n3 4\n")
    file = parse(tmp_path, ".INCLUDE a/head.dat\n.INCLUDE absent.doc\n.INCLUDE a/ink.dat\n.INCLUDE more.dat\n")
    assert positions(file) == [[[2, 1]], [[4, 3]]]
    assert [path.name for path in file.ink] == ["ink.dat", "more.dat"]


def test_incomplete_points(tmp_path: Path) -> None:
    """A cut last point is dropped; an earlier one makes a component unreadable, which keeps its number."""
    text = ".PEN_DOWN\n1 2\n3 4\n5\n.PEN_DOWN\n1 2\n3\n5 6\n.PEN_DOWN\n1 x\n.PEN_DOWN\n1 nan\n.PEN_DOWN\n7 8\n\x1a"
    assert positions(parse(tmp_path, text)) == [[[1, 2], [3, 4]], None, None, None, [[7, 8]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".INCLUDE gone.dat\n", "page.dat: includes gone.dat, which is absent: unpack it into "),
        (".INCLUDE page.dat\n", "page.dat: includes page.dat, which includes it: restore the file"),
        (".COORD X T\n", "page.dat: .COORD X T has no X and Y: restore the file"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AntherError) as error:
        parse(tmp_path, text)
    assert message in str(error.value)


def test_malformed_segments_are_counted(tmp_path: Path) -> None:
    file = parse(tmp_path, '.SEGMENT CHARACTER 0 OK\n.SEGMENT CHARACTER\n.SEGMENT CHARACTER 0 OK "a"\n')
    assert (file.malformed, len(file.segments)) == (2, 1)


def number(component: int, point: int) -> int:
    """Return a number that identifies a point of a component."""
    return 100 * component + point


COMPONENTS = [
    PenComponent(each != 2, np.array([(number(each, point), 0) for point in range(6)], np.float64)) for each in range(5)
]
"""Five components of six points; the pen is up in the third."""


@pytest.mark.parametrize(
    ("delineation", "expected"),
    [
        ("1", [range(100, 106)]),
        ("0-1", [range(6), range(100, 106)]),
        ("1-3", [range(100, 106), range(300, 306)]),  # the pen is up in 2
        ("1:4-3:2", [range(104, 106), range(300, 303)]),
        ("1:2-1:3", [range(102, 104)]),
        ("1:2-3", [range(102, 106), range(300, 306)]),
        ("1-3:0", [range(100, 106), range(300, 301)]),
        ("4,0", [range(400, 406), range(6)]),
        ("0:5,3:1-4:0,1", [range(5, 6), range(301, 306), range(400, 401), range(100, 106)]),
        ("2", []),
        ("3:6-4:0", [range(400, 401)]),  # begins after the last point
    ],
)
def test_delineations(delineation: str, expected: list[range]) -> None:
    strokes, position = delineate(COMPONENTS, delineation)
    assert [stroke[:, 0].tolist() for stroke in strokes] == [list(points) for points in expected]
    assert position == (expected[0][0] // 100 if expected else -1)


@pytest.mark.parametrize(
    ("delineation", "reason"),
    [
        ("?", "a delineation that can't be read"),
        ("1-", "a delineation that can't be read"),
        ("1,,2", "a delineation that can't be read"),
        ("4-5", "ink that is absent"),
        ("5", "ink that can't be read"),
    ],
)
def test_wrong_delineations(delineation: str, reason: str) -> None:
    damaged = [*COMPONENTS, PenComponent(True, None)] if delineation == "5" else COMPONENTS
    with pytest.raises(ValueError, match=f"^{reason}$"):
        delineate(damaged, delineation)
