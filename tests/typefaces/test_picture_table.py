"""Rows and images of Parquet files: as written, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import AntherError
from tests.helpers.people import character, characters, write
from typefaces.picture_table import PictureRow, read_images, read_rows


def test_rows_are_those_of_the_file(tmp_path: Path) -> None:
    table = [character("ann", "a", role="test", split="train"), character("bo", "b", role="extra", split=None)]
    file = write(tmp_path / "people.parquet", table)
    assert read_rows(file) == [
        PictureRow(file, 0, "ann", "lowercase letter a", "test", "train"),
        PictureRow(file, 1, "bo", "lowercase letter b", "extra", None),
    ]


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "people.parquet", [{"writer": 7, **character("ann", "a")}])
    (row,) = read_rows(file, person="writer")
    assert (row.person, row.role, row.split) == ("7", None, None)
    with pytest.raises(AntherError, match=r"no column role; its columns are writer, person, text, image"):
        read_rows(file, required=["role"])


@pytest.mark.parametrize("row_group_size", [None, 3])
def test_images_of_wanted_rows_only(tmp_path: Path, row_group_size: int | None) -> None:
    table = characters(["ann", "bo"])
    files = [write(tmp_path / f"{i}.parquet", table, row_group_size=row_group_size) for i in range(2)]
    wanted = [read_rows(files[0])[i] for i in (39, 4, 5)] + [read_rows(files[1])[7]]
    images = {(row.file, row.number): image.data for row, image in read_images(wanted)}
    assert images == {(row.file, row.number): table[row.number]["image"]["bytes"] for row in wanted}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"person": None}, r"row 1: person=None is no person"),
        ({"person": "  "}, r"row 1: person=   is no person"),
        ({"image": None}, r"row 1 \(bo\): has no picture"),
        ({"image": {"bytes": b"", "path": None}}, r"row 1 \(bo\): has no picture"),
    ],
)
def test_wrong_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "people.parquet", [character("ann", "a"), character("bo", "b") | change])
    with pytest.raises(AntherError, match=message):
        list(read_images(read_rows(file)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"person": "ann", "text": "a cat"}, r"no column image; its columns are person, text"),
        ({"person": "ann", "text": "a cat", "image": b"png"}, r"the column image is binary; it must be a struct"),
        ({"person": "ann", "text": 3, "image": {"bytes": b"png"}}, r"the column text is int64; it must be text"),
        ({"person": 1.5, "text": "a cat", "image": {"bytes": b"png"}}, r"row 0: person=1.5 is no person"),
    ],
)
def test_wrong_column(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(AntherError, match=message):
        read_rows(write(tmp_path / "people.parquet", [row]))


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"absent\.parquet: no such file"):
        read_rows(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(AntherError, match=r"text\.parquet: can't be read as Parquet"):
        read_rows(tmp_path / "text.parquet")
    file = write(tmp_path / "cut.parquet", characters(["ann"]))
    data = file.read_bytes()
    rows = read_rows(file)
    file.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])  # footer intact
    with pytest.raises(AntherError, match=r"cut\.parquet: can't be read as Parquet"):
        list(read_images(rows))
