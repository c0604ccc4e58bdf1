"""The shipped file matches the data card."""

from __future__ import annotations

import io
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from typefaces import dataset
from typefaces.making import table
from typefaces.making.order import order
from typefaces.making.render import png


@pytest.fixture(scope="module")
def rows():
    """Return every stored family, without decoding its images."""
    return pq.read_table(dataset.FILE).to_pylist()


@pytest.fixture(scope="module")
def writers(rows):
    return [row for row in rows if row["role"] != "public"]


@pytest.fixture(scope="module")
def development():
    return dataset.load("development")


def test_file_size_and_roles(rows):
    assert dataset.FILE.stat().st_size <= 12_000_000
    roles = Counter(row["role"] for row in rows)
    designs = {role: len({row["design"] for row in rows if row["role"] == role}) for role in dataset.ROLES}
    assert sum(designs.values()) >= 450
    assert designs["public"] >= 150
    assert roles["development"] == designs["development"] == 20
    assert roles["test"] == designs["test"] >= 200
    assert set(roles) == set(dataset.ROLES)


def test_designs_are_not_repeated(rows, writers):
    roles = defaultdict(set)
    for row in rows:
        roles[row["design"]].add(row["role"])
    assert all(len(result) == 1 for result in roles.values())
    assert len({row["design"] for row in writers}) == len(writers)


def test_names_and_origins(rows):
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert all(row[key].strip() for key in ("name", "kind", "designer", "package", "licence", "design")), row[
            "name"
        ]


def test_kinds_and_designer_shares(rows, writers):
    assert {row["kind"] for row in rows if row["role"] == "public"} == {"text"}
    assert {row["kind"] for row in writers} == {"hand", "individual"}
    assert sum(row["kind"] == "hand" for row in writers) >= 60
    assert max(Counter(row["designer"] for row in writers).values()) <= len(writers) / 5


@pytest.mark.integration
def test_images_are_4_bit_png(rows):
    for row in rows[::8]:
        assert len(row["glyphs"]) == len(dataset.GLYPHS)
        for data in row["glyphs"]:
            assert data[24] == 4  # bit depth in the PNG header
            image = dataset.decode(data)
            assert image.shape == (64, 64)
            assert not (image % 17).any()
            assert image.min() < 128 < image.max() == 255


@pytest.mark.integration
def test_no_glyph_is_blank(writers):
    for row in writers:
        for glyph, data in zip(dataset.GLYPHS, row["glyphs"], strict=True):
            assert dataset.decode(data).min() < 128, f"{row['name']}: {glyph}"


def test_png_round_trip():
    image = (np.random.default_rng(0).integers(0, 16, (64, 64)) * 17).astype(np.uint8)
    assert np.array_equal(dataset.decode(png(image)), image)
    with Image.open(io.BytesIO(png(image))) as opened:
        opened.verify()


def test_load_one_role(development):
    assert [family.name for family in development] == sorted(family.name for family in development)
    assert {family.role for family in development} == {"development"}
    assert all(family.images.shape == (62, 64, 64) and family.images.dtype == np.uint8 for family in development)


def test_families_share_a_baseline(development):
    """Flat-bottomed capitals end on the same row, and capitals are taller than x."""
    family = next(family for family in development if family.name == "Reggae One")
    ink = {glyph: np.flatnonzero((family.images[i] < 128).any(axis=1)) for i, glyph in enumerate(dataset.GLYPHS)}
    feet = [ink[glyph][-1] for glyph in "EFHKLMTx"]
    assert max(feet) - min(feet) <= 2
    assert ink["x"][0] > ink["X"][0] + 5
    assert ink["p"][-1] > max(feet) + 5


def test_unknown_role_is_refused():
    with pytest.raises(ValueError, match="must be one of: public, development, test"):
        dataset.load("train")


def test_captions():
    assert dataset.caption("7") == "digit 7"
    assert dataset.caption("A") == "capital letter A"
    assert dataset.caption("a") == "lowercase letter a"
    assert len({dataset.caption(glyph) for glyph in dataset.GLYPHS}) == len(dataset.GLYPHS) == 62
    for wrong in ("é", "ab", ""):
        with pytest.raises(ValueError, match="not one of the glyphs"):
            dataset.caption(wrong)


@pytest.mark.parametrize("train", [1, 5, 20])
def test_split(rows, train):
    for row in rows:
        split = dataset.split(row["order"], train)
        assert (len(split.train), len(split.validation), len(split.test)) == (train, 10, 32)
        assert len({*split.train, *split.validation, *split.test}) == train + 42
        assert split.train == dataset.split(row["order"], 20).train[:train]
        assert split.test == dataset.split(row["order"], 20).test


@pytest.mark.parametrize("train", [0, 21, -1])
def test_invalid_train_size_is_refused(rows, train):
    with pytest.raises(ValueError, match="must be 1 to 20 glyphs"):
        dataset.split(rows[0]["order"], train)


def test_invalid_order_is_refused():
    with pytest.raises(ValueError, match="permutation"):
        dataset.split([0] * 62)


def test_merged_classes_are_not_divided(rows):
    for row in rows:
        split = dataset.split(row["order"], 20)
        for group in dataset.MERGED:
            members = {dataset.GLYPHS.index(glyph) for glyph in group}
            assert any(members <= set(side) for side in (split.train, split.validation, split.test)), row["name"]


def test_default_training_glyphs(rows):
    for row in rows:
        first = [dataset.GLYPHS[i] for i in dataset.split(row["order"]).train]
        assert sum(map(str.islower, first)) >= 2
        assert any(map(str.isupper, first))
        assert all(len(set(group) & set(first)) <= 1 for group in dataset.MERGED)


def test_order_follows_from_name(rows):
    for row in rows[::20]:
        assert tuple(row["order"]) == order(row["name"])


def test_file_matches_table(rows):
    listed = {entry.name: entry for entry in table.read()}
    assert set(listed) == {row["name"] for row in rows}
    for row in rows:
        for key in ("role", "kind", "designer", "package", "licence", "design"):
            assert row[key] == getattr(listed[row["name"]], key), row["name"]


def test_leaked_design_is_refused():
    entries = table.read()
    writer = next(entry for entry in entries if entry.role == "test")
    with pytest.raises(ValueError, match="two roles"):
        table.check([*entries, writer._replace(name="Clone", role="public", kind="text")])


def test_dominant_designer_is_refused():
    entries = table.read()
    one = [e._replace(designer="One") if e.role == "test" else e for e in entries]
    with pytest.raises(ValueError, match="One made"):
        table.check(one)


def test_digest(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert dataset.digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len(dataset.digest()) == 64
