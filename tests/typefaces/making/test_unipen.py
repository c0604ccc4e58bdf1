"""The command writes a file that readers of the image convention understand, and lists the rest."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.unipen import add_page, form, line, put
from typefaces.dataset import GLYPHS, caption
from typefaces.making.unipen.__main__ import main
from typefaces.making.unipen.layout import PEN

CAP = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a distribution of three people with enough characters, one with too few, and damage."""
    root = tmp_path_factory.mktemp("unipen")
    add_page(root, "aga", "anna", line(GLYPHS[22:], cap=CAP))
    add_page(root, "aga", "bo", line(GLYPHS[:26], cap=CAP))
    add_page(root, "tos", "cy", line(GLYPHS[22:], cap=CAP) + line("aaa", cap=1.1 * CAP))
    add_page(root, "tos", "eve", line(GLYPHS[:25]))
    add_page(root, "tos", "dan", line(GLYPHS), {"COORD": "T P"})
    put(root / "data/1c/aga/fay.dat", '.INCLUDE aga/bo.dat\n.SEGMENT CHARACTER 99 OK "a"\n')
    return root


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "new" / "people.parquet"
    assert main([str(folder), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> list[dict]:
    return pq.read_table(written).to_pylist()


def pixels(row: dict) -> np.ndarray:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert image.mode == "L"
        return np.array(image)


def test_people_and_roles(rows: list[dict]) -> None:
    people = {row["person"]: (row["donor"], row["role"]) for row in rows}
    assert Counter(people.values()) == {("aga", "development"): 1, ("tos", "development"): 1, ("aga", "extra"): 1}
    assert all(person.startswith(f"{donor}-0") for person, (donor, _) in people.items())


def test_characters_and_samples(rows: list[dict]) -> None:
    """At most two pictures of a character, numbered from 0; the caption is the data set's."""
    tos = [(row["glyph"], row["sample"]) for row in rows if row["donor"] == "tos"]
    expected = [(glyph, sample) for glyph in GLYPHS[22:] for sample in ((0, 1) if glyph == "a" else (0,))]
    assert tos == expected
    assert all(row["text"] == caption(row["glyph"]) for row in rows)


def test_pictures_match_the_geometry(rows: list[dict]) -> None:
    """Ink reaches from the top of a glyph to its bottom, half a pen further, at one scale on one baseline."""
    scale = (64 - 2 * 2 - PEN) / (1.3 * CAP)
    baseline = 2 + PEN / 2 + scale * CAP
    for row in rows:
        if row["role"] == "development" and row["donor"] == "aga":
            width, height, bottom = form(row["glyph"], CAP)
            dark = pixels(row) < 128
            top, low = np.flatnonzero(dark.any(axis=1))[[0, -1]]
            left, right = np.flatnonzero(dark.any(axis=0))[[0, -1]]
            assert top == pytest.approx(baseline - scale * (bottom + height) - PEN / 2, abs=1.2)
            assert low + 1 == pytest.approx(baseline - scale * bottom + PEN / 2, abs=1.2)
            assert right + 1 - left == pytest.approx(scale * width + PEN, abs=2)
            assert (left + right + 1) / 2 == pytest.approx(32, abs=1)


def test_pictures_have_sixteen_gray_levels(rows: list[dict]) -> None:
    images = np.stack([pixels(row) for row in rows])
    assert images.shape[1:] == (64, 64)
    assert set(np.unique(images)) == set(range(0, 256, 17))


def test_schema_follows_the_image_convention(written: Path) -> None:
    """`datasets` takes the types of columns from this metadata; each column needs one."""
    schema = pq.read_schema(written)
    assert schema.names == ["person", "donor", "role", "glyph", "sample", "text", "image"]
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features.pop("image") == {"_type": "Image"}
    assert features.pop("sample") == {"dtype": "int64", "_type": "Value"}
    names = ("person", "donor", "role", "glyph", "text")
    assert features == {name: {"dtype": "string", "_type": "Value"} for name in names}
    assert b"10.5281/zenodo.1195803" in schema.metadata[b"anther.people.source"]


def test_no_names_in_the_file(written: Path) -> None:
    table = pq.read_table(written).drop_columns(["image"])
    text = json.dumps(table.to_pylist())
    assert not [name for name in ("anna", "bo", "cy", "dan") if name in text]


def test_summary(folder: Path, tmp_path: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary accounts for everything; the file is the same each time."""
    out = tmp_path / "again.parquet"
    assert main([str(folder), str(out)]) == 0
    first, second, third, *damaged = capsys.readouterr().out.splitlines()
    pictures = pq.read_metadata(out).num_rows
    assert first.startswith(f"{out}: 3 people (2 development, 0 test, 1 extra), {pictures} pictures, 0.")
    # 40 + 26 + 40 + 3 + 25 characters
    assert second == "read: 134 characters of 4 people; left out with fewer than 26 different ones: 1 people"
    assert third == "segments left out: 1 × ink that is absent"
    assert damaged[0] == "damaged files skipped: 3"  # digits, capital and lowercase letters
    assert all("dan.dat: .COORD T P has no X and Y: restore the file" in message for message in damaged[1:])
    assert out.read_bytes() == written.read_bytes()


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "small"
    add_page(root, "aga", "anna", line("abc"))
    put(root / "data/1c/aga/bo.dat", ".INCLUDE gone.dat\n")
    out, file = tmp_path / "out.parquet", put(tmp_path / "file", "")
    for arguments, message in (
        ((tmp_path / "absent", out), "absent: has no folders data and include: name the unpacked folder"),
        ((root, root), "small: is a folder: name the Parquet file to write, such as "),
        ((root, out), "small: no person wrote 26 different letters and digits in "),
        ((root, out), " (damaged files: 1; "),
        ((root, file / "out.parquet"), "file: "),
    ):
        assert main(list(map(str, arguments))) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert message in text
        assert text.count("\n") == 1
    assert not out.exists()
