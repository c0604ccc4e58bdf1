"""A person's folder of pictures: what is read, and one line for each mistake."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.data import MissingPicture, Pictures, fingerprint, load_folder, split_of
from common.errors import AntherError
from training.jobs import Picture


def save(file: Path, *, size: tuple[int, int] = (12, 10), mode: str = "RGB", value: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 20, 30)).save(file)


def caption(folder: Path, **captions: object) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def album(folder: Path, count: int = 10) -> Path:
    for number in range(count):
        save(folder / f"{number}.png", value=number)
    caption(folder, **{f"{number}.png": f"picture {number}" for number in range(count)})
    return folder


def test_a_fifth_each_is_held_out_always_the_same(tmp_path: Path) -> None:
    pictures = load_folder(album(tmp_path))
    assert [len(split) for split in pictures] == [6, 2, 2]
    assert {p.caption for split in pictures for p in split} == {f"picture {number}" for number in range(10)}
    assert all(int(p.caption.split()[1]) == p.pixels[0, 0, 0] for split in pictures for p in split)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    again = load_folder(str(tmp_path))
    assert [fingerprint(split) for split in again] == [fingerprint(split) for split in pictures]


def splits(folder: Path) -> dict[str, str]:
    """Caption -> split."""
    found = load_folder(folder)
    return {p.caption: name for name, split in zip(Pictures._fields, found, strict=True) for p in split}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.from_regex(r"[a-zé]{1,3}(/[a-z])?[0-9]{0,3}", fullmatch=True), min_size=1, max_size=5, unique=True))
def test_a_picture_more_moves_no_other(names: list[str]) -> None:
    """Whatever is there and whatever is added: each of the others is in the split where it was."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        first = next(f"{number}.png" for number in range(5) if split_of(f"{number}.png") == "train")
        captions: dict[str, object] = {first: "the first"}
        save(folder / first)
        caption(folder, **captions)
        before = splits(folder)
        assert before == {"the first": "train"}
        for name in names:
            save(folder / f"{name}.png")
            captions[f"{name}.png"] = f"picture {name}"
            caption(folder, **captions)
            after = splits(folder)
            assert {caption: after[caption] for caption in before} == before
            assert len(after) == len(before) + 1
            before = after


def test_names_in_a_row_take_turns_and_others_fall_as_they_may() -> None:
    for start in (0, 7, 998):
        row = [split_of(f"IMG_{number}.jpg") for number in range(start, start + 5)]
        assert sorted(row) == ["test", "train", "train", "train", "validation"]
    letters = "abcdefghij"
    drawn = Counter(split_of(f"{a}{b}{c}.png") for a in letters for b in letters for c in letters)
    assert [round(drawn[name] / 1000, 1) for name in Pictures._fields] == [0.6, 0.2, 0.2]
    assert split_of("a/0012.png") == split_of("a/12.jpg")


def test_a_folder_with_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    held = next(f"{number}.png" for number in range(5) if split_of(f"{number}.png") == "test")
    save(tmp_path / held)
    caption(tmp_path, **{held: "a"})
    with pytest.raises(AntherError, match=r"none of the 1 pictures is for training; add some"):
        load_folder(tmp_path)


@pytest.mark.parametrize("sheets", ["one", "each"])
def test_split_folders(tmp_path: Path, sheets: str) -> None:
    for split in Pictures._fields:
        save(tmp_path / split / "a.png")
        if sheets == "each":
            caption(tmp_path / split, **{"a.png": split})
    if sheets == "one":
        caption(tmp_path, **{f"{split}/a.png": split for split in Pictures._fields})
    assert [[p.caption for p in split] for split in load_folder(tmp_path)] == [["train"], ["validation"], ["test"]]


def test_held_out_folders_may_be_left_out(tmp_path: Path) -> None:
    save(tmp_path / "train/a.png")
    caption(tmp_path / "train", **{"a.png": "a"})
    assert [len(split) for split in load_folder(tmp_path)] == [1, 0, 0]


def test_pixels_are_as_stored_and_upright(tmp_path: Path) -> None:
    folder = album(tmp_path, 3)
    save(folder / "0.png", mode="L", value=7)
    upside_down = Image.new("RGB", (12, 10))
    exif = upside_down.getexif()
    exif[0x0112] = 6  # turned by a quarter
    upside_down.save(folder / "1.jpg", exif=exif)
    (folder / "1.png").unlink()
    caption(folder, **{"0.png": " grey ", "1.jpg": "turned", "2.png": "Größe"})
    found = {p.caption: p.pixels for split in load_folder(folder) for p in split}
    assert found["grey"].shape == (10, 12)
    assert found["turned"].shape == (12, 10, 3)
    assert found["Größe"].shape == (10, 12, 3)
    assert all(pixels.dtype == np.uint8 for pixels in found.values())


def test_hidden_files_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    folder = album(tmp_path, 3)
    save(folder / ".thumbnails/x.png")
    (folder / "._0.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    assert sum(map(len, load_folder(folder))) == 3


def only_test_pictures(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    save(folder / "test/a.png")
    caption(folder, **{"test/a.png": "a"})


def write_sheet(line: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "metadata.jsonl").write_text(line)


@pytest.mark.parametrize(
    ("spoil", "named", "mend"),
    [
        (lambda f: (f / "metadata.jsonl").unlink(), "metadata.jsonl", "write it"),
        (lambda f: caption(f, **{"0.png": "a", "1.png": "b", "2.png": " "}), "2.png", "write one"),
        (lambda f: caption(f, **{"0.png": "a", "1.png": "b", "2.png": None}), "2.png", "write one"),
        (lambda f: caption(f, **{"0.png": "a", "1.png": "b"}), "2.png", "add a line"),
        (lambda f: (f / "1.png").unlink(), "1.png", "add the picture"),
        (lambda f: (f / "1.png").write_bytes(b"no picture"), "1.png", "save it again"),
        (lambda f: (f / "1.png").write_bytes((f / "1.png").read_bytes()[:40]), "1.png", "save it again"),
        (lambda f: save(f / "1.png", size=(1, 1)), "1.png", "8×8"),
        (lambda f: save(f / "1.png", size=(100, 7)), "1.png", "8×8"),
        (lambda f: Image.new("I;16", (10, 10)).save(f / "1.png"), "1.png", "8-bit"),
        (lambda f: caption(f, **{"../0.png": "a"}), "../0.png", "copy the picture"),
        (lambda f: caption(f, **{"/etc/passwd": "a"}), "/etc/passwd", "copy the picture"),
        (lambda f: ((f / "1.png").unlink(), (f / "1.png").symlink_to("/etc/passwd")), "1.png", "copy the picture"),
        (lambda f: caption(f, **{"0.png": "a", "./0.png": "b"}), "0.png", "remove one"),
        (lambda f: save(f / "train/x.png"), "train/x.png", "add a line"),
        (lambda f: (f / "train").mkdir(), ".png", "move it into"),
        (only_test_pictures, "train", "put some there"),
        (write_sheet("{"), "metadata.jsonl:1", "JSON object"),
        (write_sheet("[]"), "metadata.jsonl:1", "JSON object"),
        (write_sheet('"x"'), "metadata.jsonl:1", "JSON object"),
        (write_sheet('{"text": "x"}'), "metadata.jsonl:1", "JSON object"),
        (write_sheet('{"file_name": 3, "text": "x"}'), "metadata.jsonl:1", "name of a picture"),
        (write_sheet('{"file_name": "", "text": "x"}'), "metadata.jsonl:1", "name of a picture"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_file_and_the_mend(
    tmp_path: Path, spoil: Callable[[Path], object], named: str, mend: str
) -> None:
    folder = album(tmp_path / "photos", 3)
    spoil(folder)
    with pytest.raises(AntherError) as raised:
        load_folder(folder)
    line = str(raised.value)
    assert named in line
    assert mend in line
    assert "\n" not in line


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"photos: no such folder"):
        load_folder(tmp_path / "photos")


def test_a_fingerprint_tells_any_change() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    changed = pixels.copy()
    changed[7, 7, 2] = 1
    first, second = Picture(pixels, "a"), Picture(changed, "a")
    kinds = [
        [first],
        [second],
        [Picture(pixels, "b")],
        [first, second],
        [second, first],
        [],
        [Picture(pixels.reshape(8, 24), "a")],
    ]
    assert len({fingerprint(pictures) for pictures in kinds}) == len(kinds)
    assert fingerprint([first]) == fingerprint(iter([first]))


def test_what_cannot_be_used_is_absent_in_its_place(tmp_path: Path) -> None:
    """For private jobs: a missing file, a damaged one and one that isn't described; the rest is as it was."""
    files = [f"train/{letter}.png" for letter in "abcdef"]
    for place, file in enumerate(files):
        save(tmp_path / file, value=place)
    caption(tmp_path, **{file: f"text {file}" for file in files})
    whole = load_folder(tmp_path).train
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    lines[4] = json.dumps({"file_name": files[4]})
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "no JSON"]))
    (tmp_path / files[1]).unlink()
    (tmp_path / files[3]).write_bytes(b"damaged")
    said: list[AntherError] = []
    found = load_folder(tmp_path, on_error=said.append).train
    assert [isinstance(one, MissingPicture) for one in found] == [False, True, False, True, True, False]
    for place in (0, 2, 5):
        assert fingerprint([found[place]]) == fingerprint([whole[place]])
    for words in ("b.png doesn't exist", "d.png", "e.png has no caption", "JSON object"):
        assert any(words in str(error) for error in said), said
    with pytest.raises(AntherError):
        load_folder(tmp_path)


@pytest.mark.parametrize("make", [lambda root: root / "nowhere", lambda root: root])
def test_a_folder_that_cannot_be_used_has_no_pictures(make: Callable[[Path], Path], tmp_path: Path) -> None:
    said: list[AntherError] = []
    assert load_folder(make(tmp_path), on_error=said.append) == Pictures((), (), ())
    assert len(said) == 1


def test_fingerprints_of_pixels_in_memory_stay_what_they_were() -> None:
    """They key cached latents and the random streams of private jobs: by shape, caption and pixels."""
    pixels = np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3)
    text = repr(((8, 8, 3), 3, "cat")).encode()
    assert fingerprint([Picture(pixels, "cat")]) == hashlib.sha256(text + pixels.tobytes()).hexdigest()
