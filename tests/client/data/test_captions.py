"""Captions from metadata files, text files beside pictures, and one for all; names of any characters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from client.data import StoredPicture, fingerprint, load_folder
from common.errors import AntherError

ODD_NAMES = [
    "with space.png",
    'it\'s "quoted".png',
    "new\nline.png",
    "🐱.png",
    "写真.png",
    "-dash.png",
    "a;b|c&d.png",
    "100%.png",
    os.fsdecode(b"latin-\xe9.png"),
]


def put(folder: Path, *names: str) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), index).save(folder / name, "PNG")


def captions(folder: Path, caption: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return the captions by file name."""
    parts = load_folder(folder, caption=caption)
    return {
        picture.path.name: picture.captions for part in parts for picture in part if isinstance(picture, StoredPicture)
    }


def test_text_files_have_a_caption_per_line(tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png", "b.jpg", "deep/c.png")
    (tmp_path / "train/a.txt").write_text("one cat\n\n  the same cat  \none cat\n")
    (tmp_path / "train/b.txt").write_bytes("\ufeffGröße\r\n".encode())
    (tmp_path / "train/deep/c.txt").write_text("far below")
    (tmp_path / "train/notes.txt").write_text("no picture has this name")
    assert captions(tmp_path) == {"a.png": ("one cat", "the same cat"), "b.jpg": ("Größe",), "c.png": ("far below",)}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_any_characters(name: str, tmp_path: Path) -> None:
    put(tmp_path / "train", name)
    assert captions(tmp_path, "a cat") == {name: ("a cat",)}
    (tmp_path / "train" / f"{name[:-4]}.txt").write_text("by its side")
    assert captions(tmp_path) == {name: ("by its side",)}
    (tmp_path / "train" / name).write_bytes(b"damaged")
    with pytest.raises(AntherError) as raised:
        load_folder(tmp_path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_any_characters_are_split(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, *(f"{number}.png" for number in range(5)))
    assert name in captions(tmp_path, "a cat")


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name.isascii() or "latin" not in name])
def test_csv_lists_pictures(name: str, tmp_path: Path) -> None:
    import csv

    put(tmp_path / "train", name, "b.png")
    with (tmp_path / "train/metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["rating", "text", "file_name"], ["5", 'a "cat",\nasleep', name], ["1", "Größe", "b.png"]])
    assert captions(tmp_path) == {name: ('a "cat",\nasleep',), "b.png": ("Größe",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;text\na.png;cat\n", "must have columns file_name,text; separate them by commas"),
        ("file_name,caption\na.png,cat\n", "must have columns file_name,text; name them so"),
        ("", "must have columns"),
        ("file_name,text\na.png,a cat, asleep\n", "metadata.csv:2: has too many columns; put the caption in double"),
        ("file_name,text\na.png,\n", "a.png has no caption"),
        ("file_name,text\na.png\n", "a.png has no caption"),
        ('file_name,text\na.png,"cat\n', "can't be read (unexpected end of data); put captions in double quotes"),
        ("file_name,text\nb.png,cat\n", "b.png doesn't exist"),
    ],
)
def test_invalid_csv_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png")
    (tmp_path / "train/metadata.csv").write_text(text)
    with pytest.raises(AntherError) as raised:
        load_folder(tmp_path)
    assert message in str(raised.value)
    assert str(raised.value).isprintable()


def test_list_of_captions(tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png", "b.png")
    lines = [{"file_name": "a.png", "text": ["x", " y "]}, {"file_name": "b.png", "text": "z"}]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert captions(tmp_path) == {"a.png": ("x", "y"), "b.png": ("z",)}
    pictures = load_folder(tmp_path).train
    assert [picture.caption for picture in pictures] == ["x", "z"]
    single = StoredPicture(tmp_path / "train/a.png", "x")
    assert fingerprint([pictures[0]]) != fingerprint([single])


@pytest.mark.parametrize("text", [[], ["x", ""], ["x", 3], [["x"]], {"en": "x"}])
def test_invalid_list_of_captions(text: object, tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png")
    (tmp_path / "train/metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    with pytest.raises(AntherError, match=r'a\.png has no caption; write one as "text"'):
        load_folder(tmp_path)


def test_too_many_captions(tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png")
    (tmp_path / "train/a.txt").write_text("\n".join(map(str, range(101))))
    with pytest.raises(AntherError, match=r"captions of a are 101; keep at most 100"):
        load_folder(tmp_path)


def test_template(tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png", "b.png")
    (tmp_path / "train/a.txt").write_text("asleep\nawake")
    assert captions(tmp_path, " a sks cat ") == {"a.png": ("a sks cat",), "b.png": ("a sks cat",)}
    with pytest.raises(AntherError, match=r"b\.png: has no caption"):
        load_folder(tmp_path, caption="a sks cat, {text}")
    (tmp_path / "train/b.txt").write_text("in {braces}")
    assert captions(tmp_path, "sks, {text}!") == {
        "a.png": ("sks, asleep!", "sks, awake!"),
        "b.png": ("sks, in {braces}!",),
    }


def test_closest_sheet_wins_over_text_files(tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png", "cats/b.png", "c.png")
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "listed"}')
    (tmp_path / "train/cats/metadata.csv").write_text("file_name,text\nb.png,in its folder\n")
    for name in ("a", "c"):
        (tmp_path / f"train/{name}.txt").write_text("beside")
    assert captions(tmp_path) == {"a.png": ("listed",), "b.png": ("in its folder",), "c.png": ("beside",)}
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n")
    with pytest.raises(AntherError, match=r"has both metadata\.jsonl and metadata\.csv; remove one"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.txt: is empty; write the picture's caption"),
        (b"\n \n", r"a\.txt: is empty"),
        ("Größe".encode("latin-1"), r"a\.txt:1: byte 3 isn't UTF-8 text"),
        ("cat".encode("utf-16"), r"a\.txt: is UTF-16"),
        (b"x" * 20_001, r"captions of a has 20,001 characters; shorten it"),
    ],
)
def test_invalid_text_file_is_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png", "b.png")
    (tmp_path / "train/a.txt").write_bytes(data)
    (tmp_path / "train/b.txt").write_text("fine")
    with pytest.raises(AntherError, match=message):
        load_folder(tmp_path)
    errors: list[AntherError] = []
    pictures = load_folder(tmp_path, on_error=errors.append).train
    assert [picture.caption for picture in pictures] == ["", "fine"]  # the first is missing, and keeps its position
    assert len(errors) == 1


def test_links_and_pipes_among_pictures(tmp_path: Path) -> None:
    put(tmp_path / "train", "a.png")
    (tmp_path / "train/b.png").symlink_to("a.png")
    assert captions(tmp_path, "a cat") == {"a.png": ("a cat",)}
    os.mkfifo(tmp_path / "train/c.png")
    with pytest.raises(AntherError, match=r"c\.png: is not a file"):
        load_folder(tmp_path, caption="a cat")
    (tmp_path / "train/c.png").unlink()
    (tmp_path / "train/c.png").symlink_to("/etc/hostname")
    with pytest.raises(AntherError, match=r"c\.png: lies outside"):
        load_folder(tmp_path, caption="a cat")
