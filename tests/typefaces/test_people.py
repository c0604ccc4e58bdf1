"""Files of people's handwriting: read as written, and refused in one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import AntherError
from typefaces import people
from typefaces.dataset import GLYPHS, caption

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (4, 64, 64), np.uint8)


def png(pixels: np.ndarray) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def rows() -> list[dict[str, object]]:
    named = [("bo", "extra", "a"), ("ann", "extra", "7"), ("bo", "extra", "Q"), ("cy", "test", "b")]
    return [
        {"person": person, "role": role, "text": caption(glyph), "image": png(pixels)}
        for (person, role, glyph), pixels in zip(named, PICTURES, strict=True)
    ]


def write(folder: Path, table: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(table), folder / "hands.parquet")
    return folder / "hands.parquet"


def test_people_of_a_role(tmp_path: Path) -> None:
    ann, bo = people.load(write(tmp_path, rows()), role="extra")
    assert (ann.person, bo.person) == ("ann", "bo")
    assert [GLYPHS[number] for number in bo.classes] == ["a", "Q"]
    assert (bo.images == PICTURES[[0, 2]]).all()
    assert (ann.images == PICTURES[[1]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "a letter"}, r"bo, 'a letter': not a caption of a character"),
        ({"image": {"bytes": b"no picture", "path": None}}, r"bo, 'lowercase letter a': the picture can't be read"),
        ({"image": {"bytes": None, "path": None}}, r"row 0 \(bo\): has no picture"),
        ({"image": {"bytes": None, "path": "a.png"}}, r"bo, 'lowercase letter a': the picture can't be read"),
        ({"image": png(PICTURES[0][:60])}, r"bo, 'lowercase letter a': the picture has 64 × 60 pixels, not 64 × 64"),
    ],
)
def test_mistake_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    table = rows()
    table[0] |= change
    with pytest.raises(AntherError, match=message) as error:
        people.load(write(tmp_path, table), role="extra")
    assert "\n" not in str(error.value)


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"no person has role=development"):
        people.load(write(tmp_path, rows()), role="development")
    with pytest.raises(AntherError, match=r"absent.parquet: no such file"):
        people.load(tmp_path / "absent.parquet", role="extra")
    without = [{name: value for name, value in row.items() if name != "role"} for row in rows()]
    with pytest.raises(AntherError, match=r"no column role; its columns are person, text, image"):
        people.load(write(tmp_path, without), role="extra")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(AntherError, match=r"can't be read as Parquet"):
        people.load(tmp_path / "text.parquet", role="extra")
