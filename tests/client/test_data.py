"""Reading a folder of pictures: accepted content, and one line for each mistake."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.data import (
    MissingPicture,
    Pictures,
    StoredPicture,
    fingerprint,
    list_pictures,
    load_folder,
    split_of,
)
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


def test_splits_are_stable(tmp_path: Path) -> None:
    pictures = load_folder(album(tmp_path))
    assert [len(split) for split in pictures] == [6, 2, 2]
    assert {p.caption for split in pictures for p in split} == {f"picture {number}" for number in range(10)}
    assert all(int(p.caption.split()[1]) == p.pixels[0, 0, 0] for split in pictures for p in split)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    repeated = load_folder(str(tmp_path))
    assert [fingerprint(split) for split in repeated] == [fingerprint(split) for split in pictures]


def splits(folder: Path) -> dict[str, str]:
    """Return {caption: split}."""
    pictures = load_folder(folder)
    return {p.caption: name for name, split in zip(Pictures._fields, pictures, strict=True) for p in split}


def test_listed_pictures_are_those_that_are_loaded(tmp_path: Path) -> None:
    listed = list_pictures(album(tmp_path / "flat"))
    loaded = {picture.caption for split in load_folder(tmp_path / "flat") for picture in split}
    assert ({picture.caption for picture in listed}, {picture.split for picture in listed}) == (loaded, {None})
    folder = tmp_path / "split"
    names = {f"{split}/{number}.png": f"{split} {number}" for split in ("Train", "val", "test") for number in range(2)}
    for name in names:
        save(folder / name)
    caption(folder, **names)
    pictures = load_folder(folder)
    assert [(picture.caption, picture.split) for picture in list_pictures(folder)] == [
        (picture.caption, split)
        for split in ("train", "test", "validation")  # sorted by folder: Train, test, val
        for picture in getattr(pictures, split)
    ]
    save(folder / "outside.png")
    caption(folder, **names, **{"outside.png": "outside"})
    with pytest.raises(AntherError, match=r"outside\.png: lies outside Train, val, test; move it into one of them"):
        list_pictures(folder)


def test_picture_may_be_decoded_late(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    picture = StoredPicture(tmp_path / "a.png", "a cat", verify=False)
    with pytest.raises(AntherError, match=r"a\.png: can't be read as a picture"):
        _ = picture.pixels
    with pytest.raises(AntherError, match=r"a\.png: can't be read as a picture"):
        StoredPicture(tmp_path / "a.png", "a cat")


@given(st.lists(st.from_regex(r"[a-zé]{1,3}(/[a-z])?[0-9]{0,3}", fullmatch=True), min_size=1, max_size=5, unique=True))
def test_added_picture_moves_no_other(names: list[str]) -> None:
    """Adding one picture to any folder leaves every other picture in its split."""
    with TemporaryDirectory() as index:
        folder = Path(index)
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


def test_consecutive_names_alternate() -> None:
    for start in (0, 7, 998):
        row = [split_of(f"IMG_{number}.jpg") for number in range(start, start + 5)]
        assert sorted(row) == ["test", "train", "train", "train", "validation"]
    letters = "abcdefghij"
    counts = Counter(split_of(f"{a}{b}{c}.png") for a in letters for b in letters for c in letters)
    assert [round(counts[name] / 1000, 1) for name in Pictures._fields] == [0.6, 0.2, 0.2]
    assert split_of("a/0012.png") == split_of("a/12.jpg")


def test_folder_without_training_pictures_is_refused(tmp_path: Path) -> None:
    pictures = next(f"{number}.png" for number in range(5) if split_of(f"{number}.png") == "test")
    save(tmp_path / pictures)
    caption(tmp_path, **{pictures: "a"})
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


def test_held_out_folders_are_optional(tmp_path: Path) -> None:
    save(tmp_path / "train/a.png")
    caption(tmp_path / "train", **{"a.png": "a"})
    assert [len(split) for split in load_folder(tmp_path)] == [1, 0, 0]


def test_pixels_are_upright(tmp_path: Path) -> None:
    folder = album(tmp_path, 3)
    save(folder / "0.png", mode="L", value=7)
    upside_down = Image.new("RGB", (12, 10))
    exif = upside_down.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    upside_down.save(folder / "1.jpg", exif=exif)
    (folder / "1.png").unlink()
    caption(folder, **{"0.png": " grey ", "1.jpg": "turned", "2.png": "Größe"})
    pictures = {p.caption: p.pixels for split in load_folder(folder) for p in split}
    assert pictures["grey"].shape == (10, 12)
    assert pictures["turned"].shape == (12, 10, 3)
    assert pictures["Größe"].shape == (10, 12, 3)
    assert all(pixels.dtype == np.uint8 for pixels in pictures.values())


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
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
        (lambda f: Image.new("F", (10, 10)).save(f / "1.png", "TIFF"), "1.png", "8-bit"),
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
def test_errors_are_one_line_with_file_and_remedy(
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


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"photos: no such folder"):
        load_folder(tmp_path / "photos")


def test_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AntherError, match="empty name"):
        load_folder("")


def test_fingerprint_detects_any_change() -> None:
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


def test_unusable_picture_keeps_its_position(tmp_path: Path) -> None:
    """For private jobs: a missing file, a damaged file and a bad line; the other pictures are unchanged."""
    files = [f"train/{letter}.png" for letter in "abcdef"]
    for index, file in enumerate(files):
        save(tmp_path / file, value=index)
    caption(tmp_path, **{file: f"text {file}" for file in files})
    whole = load_folder(tmp_path).train
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    lines[4] = json.dumps({"file_name": files[4]})
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "no JSON"]))
    (tmp_path / files[1]).unlink()
    (tmp_path / files[3]).write_bytes(b"damaged")
    output: list[AntherError] = []
    pictures = load_folder(tmp_path, on_error=output.append).train
    assert [isinstance(one, MissingPicture) for one in pictures] == [False, True, False, True, True, False]
    for index in (0, 2, 5):
        assert fingerprint([pictures[index]]) == fingerprint([whole[index]])
    for words in ("b.png doesn't exist", "d.png", "e.png has no caption", "JSON object"):
        assert any(words in str(error) for error in output), output
    with pytest.raises(AntherError):
        load_folder(tmp_path)


@pytest.mark.parametrize("make", [lambda root: root / "nowhere", lambda root: root])
def test_unusable_folder_has_no_pictures(make: Callable[[Path], Path], tmp_path: Path) -> None:
    output: list[AntherError] = []
    assert load_folder(make(tmp_path), on_error=output.append) == Pictures((), (), ())
    assert len(output) == 1


def test_fingerprints_in_memory_are_unchanged() -> None:
    """They key cached latents and the random streams of private jobs: by shape, caption and pixels."""
    pixels = np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3)
    text = repr(((8, 8, 3), 3, "cat")).encode()
    assert fingerprint([Picture(pixels, "cat")]) == hashlib.sha256(text + pixels.tobytes()).hexdigest()
