"""People of a data set: chosen, split and opened as asked, and one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import AntherError
from conf.schemas.training import DataConfig
from simulations.fleet import people as module
from simulations.fleet.people import count_people, load_people
from tests.helpers.people import Row, character, characters, png, write
from typefaces.dataset import GLYPHS

NAMES = ("ann", "bo", "cy", "di", "ed", "fay")
SIZES: dict[str, Any] = {"train": 3, "validation": 2, "test": 2}


def data(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(**SIZES | {"path": str(path)} | settings)


def file_of(folder: Path, change: Callable[[list[Row]], object] = list, names: tuple[str, ...] = NAMES) -> Path:
    """Write a file of people with ten characters each."""
    rows = characters(names, GLYPHS[:10])
    change(rows)
    return write(folder / "people.parquet", rows)


def member_names(config: DataConfig) -> list[str]:
    return [writer.name for writer in load_people(config).members]


def test_all_people_have_their_own_pictures(tmp_path: Path) -> None:
    rows = characters(NAMES, GLYPHS[:10])
    members, newcomers = load_people(data(write(tmp_path / "people.parquet", rows)))
    assert ({writer.name for writer in members}, newcomers) == (set(NAMES), [])
    pixels = {(row["person"], row["text"]): row["image"]["bytes"] for row in rows}
    for writer in members:
        assert (tuple(map(len, writer.pictures)), writer.kind, writer.role) == ((3, 2, 2), "letters", None)
        for picture in (picture for split in writer.pictures for picture in split):
            assert png(picture.pixels) == pixels[writer.name, picture.caption]


def test_fewer_people_are_a_prefix(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    everyone = member_names(data(file))
    assert everyone != sorted(everyone)
    assert [member_names(data(file, people=count)) for count in (1, 4)] == [everyone[:1], everyone[:4]]
    assert [count_people(data(file, people=count)) for count in (None, 4)] == [6, 4]


def test_shards_and_row_order_change_nothing(tmp_path: Path) -> None:
    rows = characters(NAMES, GLYPHS[:10])
    write(tmp_path / "shards" / "0.parquet", rows[35:], row_group_size=4)
    write(tmp_path / "shards" / "1.parquet", rows[:35])
    whole, shards = (
        [[[p.caption for p in split] for split in writer.pictures] for writer in load_people(data(path)).members]
        for path in (write(tmp_path / "people.parquet", rows), tmp_path / "shards")
    )
    assert shards == whole


def test_roles_choose_people(tmp_path: Path) -> None:
    rows = characters(NAMES[:3], GLYPHS[:10], role="test") + characters(NAMES[3:], GLYPHS[:10], role="extra")
    file = write(tmp_path / "people.parquet", rows)
    members, _ = load_people(data(file, roles=["test"]))
    assert {(writer.name, writer.role) for writer in members} == {("ann", "test"), ("bo", "test"), ("cy", "test")}
    assert count_people(data(file, roles=["test", "extra"])) == 6
    assert count_people(data(file, roles=["test"], newcomers=["ed", "ann"])) == 2


def test_newcomers_are_no_members(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    before = member_names(data(file))
    people = load_people(data(file, newcomers=[before[1], "Fay" if before[1] == "fay" else "fay"], people=3))
    assert [writer.name for writer in people.newcomers] == [before[1], "fay"]
    assert [writer.name for writer in people.members] == [name for name in before if name not in (before[1], "fay")][:3]


def test_repeated_newcomer(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"data\.newcomers: bo is listed twice"):
        load_people(data(file_of(tmp_path), newcomers=["bo", "bo"]))


def test_pictures_that_are_no_letters(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = file_of(
        tmp_path,
        lambda rows: [
            row.update(text=f"a cat {i}", image={"bytes": png(rng.integers(0, 256, (30 + i, 40, 3), np.uint8))})
            for i, row in enumerate(rows)
            if row["person"] == "bo"
        ],
    )
    writers = {writer.name: writer for writer in load_people(data(file)).members}
    kinds = {name: writer.kind for name, writer in writers.items()}
    assert kinds == dict.fromkeys(NAMES, "letters") | {"bo": "pictures"}
    assert all(picture.pixels.shape[1:] == (40, 3) for picture in writers["bo"].pictures.train)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("L", (20, 12), 20 * number).save(tmp_path / f"{number}.png")
    paths = [{"bytes": None, "path": f"{number}.png"} for number in range(10)]
    rows = [row | {"image": image} for row, image in zip(characters(["ann"], GLYPHS[:10]), paths, strict=True)]
    (writer,) = load_people(data(write(tmp_path / "people.parquet", rows))).members
    for picture in writer.pictures.train:
        assert (picture.pixels == 20 * int(picture.caption.split()[1])).all()
    (tmp_path / "0.png").unlink()
    rows = rows[:1] * 10
    with pytest.raises(AntherError, match=r"people\.parquet, row \d \(ann\): .*0\.png"):
        load_people(data(write(tmp_path / "people.parquet", rows)))


def imagefolder(folder: Path, count: int = 10, split: bool = False) -> Path:
    """Write one person's folder; with `split` into sub-folders."""
    lines = []
    for number in range(count):
        name = f"{('train', 'val', 'test')[number % 3]}/{number}.png" if split else f"{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (20 * number, 0, 0)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_folder_of_folders(tmp_path: Path) -> None:
    imagefolder(tmp_path / "Ann B")
    imagefolder(tmp_path / "cy", split=True)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about")
    people = {writer.name: writer for writer in load_people(data(tmp_path)).members}
    assert people.keys() == {"ann-b", "cy"}
    for writer in people.values():
        assert (tuple(map(len, writer.pictures)), writer.kind) == ((3, 2, 2), "pictures")
        for picture in writer.pictures.train:
            assert picture.pixels[0, 0, 0] == 20 * int(picture.caption.split()[1])
    numbers = [{int(picture.caption.split()[1]) % 3 for picture in split} for split in people["cy"].pictures]
    assert numbers == [{0}, {1}, {2}]


MISTAKES: dict[str, tuple[Callable[[list[Row]], object], dict[str, Any], str]] = {
    "caption": (lambda rows: rows[3].update(text=None), {}, r"row 3 \(ann\): has no caption"),
    "blank caption": (lambda rows: rows[3].update(text=" "), {}, r"row 3 \(ann\): has no caption"),
    "split": (
        lambda rows: [row.update(split="train" if i else "val") for i, row in enumerate(rows)],
        {},
        r"row 0 \(ann\): split=val; must be one of: train, validation, test",
    ),
    "no split": (
        lambda rows: [row.update(split="train" if i else None) for i, row in enumerate(rows)],
        {},
        r"row 0 \(ann\): split=None",
    ),
    "picture": (
        lambda rows: [row.update(image={"bytes": b"no picture"}) for row in rows[10:20]],
        {},
        r"people\.parquet, row 1\d \(bo\): can't be read as a picture",
    ),
    "truncated picture": (
        lambda rows: [row.update(image={"bytes": row["image"]["bytes"][:-900]}) for row in rows[10:20]],
        {},
        r"people\.parquet, row 1\d \(bo\): can't be read as a picture",
    ),
    "too few pictures": (
        lambda rows: [rows.pop(first) for first in (54, 40) for _ in range(6)],
        {},
        r"(ed|fay): has \d pictures, .*fewer than data\.\w+=\d \(and 1 more people\)",
    ),
    "slug": (
        lambda rows: [row.update(person="Bo!") for row in rows[20:30]],
        {},
        r"(bo and Bo!|Bo! and bo): devices of both would be called bo; rename one of them",
    ),
    "two roles": (
        lambda rows: [row.update(role="test" if i else "extra") for i, row in enumerate(rows)],
        {},
        r"row 1 \(ann\): role=test, but extra in .*row 0",
    ),
    "unknown role": (
        lambda rows: [row.update(role="test") for row in rows],
        {"roles": ["tests"]},
        r"data\.roles: no person of .* has role=tests; its roles are test",
    ),
    "unknown evaluated role": (
        lambda rows: [row.update(role="test") for row in rows],
        {"evaluated_roles": ["dev"]},
        r"data\.evaluated_roles: no person of .* has role=dev; its roles are test",
    ),
    "no column role": (list, {"roles": ["test"]}, r"no column role; its columns are person, text, image"),
    "no column person": (list, {"person": "writer"}, r"no column writer; its columns are person, text, image"),
    "unknown newcomer": (list, {"newcomers": ["annn"]}, r"data\.newcomers: there is no annn; did you mean ann\?"),
    "too few people": (list, {"people": 7}, r"data\.people=7: .* has only 6 people"),
    "only newcomers": (list, {"newcomers": list(NAMES)}, r"has only 0 people besides data\.newcomers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(tmp_path: Path, mistake: str) -> None:
    change, settings, message = MISTAKES[mistake]
    with pytest.raises(AntherError, match=message) as error:
        load_people(data(file_of(tmp_path, change), **settings))
    assert "\n" not in str(error.value)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"data\.path=.*absent: no such file or folder"):
        load_people(data(tmp_path / "absent"))
    with pytest.raises(AntherError, match=r"has no people; data\.path needs \*\.parquet, or a folder of pictures"):
        load_people(data(tmp_path))
    imagefolder(tmp_path / "ann")
    with pytest.raises(AntherError, match=r"is the folder of one person"):
        load_people(data(tmp_path / "ann"))
    with pytest.raises(AntherError, match=r"data\.person=writer: only used with Parquet files"):
        load_people(data(tmp_path, person="writer"))
    with pytest.raises(AntherError, match=r"data\.roles: no person of .* has role=test; it has no roles"):
        load_people(data(tmp_path, roles=["test"]))
    (tmp_path / "ann" / "3.png").write_bytes(b"no picture")
    with pytest.raises(AntherError, match=r"ann/3\.png: can't be read as a picture"):
        load_people(data(tmp_path, train=6))


def test_pictures_are_decoded_late_beyond_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(
        "simulations.fleet.encoded_picture.decode", lambda source, *_, **__: decoded.append(source) or np.zeros((9, 9))
    )
    monkeypatch.setattr(module, "VERIFIED", 4)
    members, _ = load_people(data(file_of(tmp_path)))
    assert len(decoded) == 4
    assert members[-1].pictures.test[0].pixels.shape == (9, 9)
    assert len(decoded) == 5


def test_unused_pictures_are_not_opened(tmp_path: Path) -> None:
    """Only people and pictures that a run uses need to be readable."""
    file = file_of(tmp_path)
    chosen = load_people(data(file, people=1)).members[0].name
    rows = characters(NAMES, GLYPHS[:10])
    for row in rows:
        if row["person"] != chosen:
            row["image"] = {"bytes": b"no picture"}
    assert member_names(data(write(file, rows), people=1)) == [chosen]


def test_numbers_are_names(tmp_path: Path) -> None:
    rows = [character(str(number), glyph) | {"person": number} for number in (3, 7) for glyph in GLYPHS[:10]]
    file = write(tmp_path / "people.parquet", rows)
    assert sorted(member_names(data(file))) == ["3", "7"]
    assert member_names(data(file, newcomers=["3"])) == ["7"]
