"""Decoding of pictures of any format, with one line that names the file if it fails."""

from __future__ import annotations

import contextlib
import json
import os
import random
import stat
import struct
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data import fingerprint, load_folder, split_of
from client.data.reading import MAX_PIXELS
from client.data.splits import split_named
from common.errors import AntherError

WHITE, BLACK = 255, 0


def new_picture(folder: Path, name: str = "a.png", text: str = "a thing") -> Path:
    """Return the path of a training picture, after writing its metadata line."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    line = json.dumps({"file_name": name, "text": text})
    (folder / "train" / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    return folder / "train" / name


def only(folder: Path, **options: str) -> np.ndarray:
    return load_folder(folder, **options).train[0].pixels


def transparent_square(mode: str) -> Image.Image:
    """Return a black 8×8 square in a transparent 16×16 picture, whose hidden pixels are black or red."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (16, 16), (255, 0, 0, 0) if mode == "RGBA" else (0, 0))
        image.paste((0, 0, 0, 255) if mode == "RGBA" else (0, 255), (4, 4, 12, 12))
        return image
    image = Image.new(mode, (16, 16), 7 if mode != "RGB" else (7, 7, 7))  # index 7 is transparent
    if mode == "P":
        image.putpalette([0, 0, 0] * 7 + [255, 0, 0] + [0, 0, 0] * 248)
    image.paste(0, (4, 4, 12, 12))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize(("background", "value"), [("white", WHITE), ("black", BLACK), ("#808080", 128)])
def test_background_shows_through_transparency(tmp_path: Path, mode: str, background: str, value: int) -> None:
    file = new_picture(tmp_path)
    hidden = {"P": 7, "L": 7, "RGB": (7, 7, 7)}.get(mode)
    transparent_square(mode).save(file, **({} if hidden is None else {"transparency": hidden}))
    pixels = only(tmp_path, background=background)
    expected = np.full((16, 16), value, np.uint8)
    expected[4:12, 4:12] = 0
    assert pixels.ndim == (2 if mode in ("L", "LA") else 3)
    assert np.array_equal(pixels if pixels.ndim == 2 else pixels[..., 1], expected)


def test_partial_transparency_is_blended(tmp_path: Path) -> None:
    file = new_picture(tmp_path)
    Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(file)
    assert set(only(tmp_path).ravel()) == {127}
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(file)
    assert np.array_equal(only(tmp_path), pixels[..., :3])


def test_background_is_part_of_fingerprint(tmp_path: Path) -> None:
    transparent_square("RGBA").save(new_picture(tmp_path))
    prints = {fingerprint(load_folder(tmp_path, background=color).train) for color in ("white", "black")}
    assert len(prints) == 2


def exif(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """Return an EXIF block with these entries: tag, type, count, value."""
    at, head, tail = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, value in entries:
        where = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "L", at + len(tail))
        tail += value if len(value) > 4 else b""
        head += struct.pack(order + "HHL", tag, kind, count) + where
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + mark + struct.pack(order + "LH", 8, len(entries)) + head + struct.pack(order + "L", 0) + tail


TURN = (0x112, 3, 1, struct.pack("<H", 6))


@pytest.mark.parametrize(
    "entry",
    [
        (0x100, 9, 1, struct.pack("<l", -5)),  # a width of -5
        (0x11A, 2, 4, b"72\0\0"),  # a resolution as text
        (0x132, 5, 1, struct.pack("<LL", 1, 0)),  # a date of 1/0
        (0x9003, 12, 1, b"\xff" * 8),
        (0x8769, 4, 1, struct.pack("<L", 1 << 31)),  # a pointer to a missing block
    ],
)
def test_orientation_with_invalid_exif(tmp_path: Path, entry: tuple[int, int, int, bytes]) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.new("RGB", (32, 24)).save(new_picture(tmp_path, name), exif=exif(sorted([TURN, entry])))
        assert only(tmp_path).shape == (32, 24, 3)
        (tmp_path / "train" / name).unlink()


def test_random_exif_never_raises(tmp_path: Path) -> None:
    coin = random.Random(0)
    file = new_picture(tmp_path, "a.jpg")
    for _ in range(150):
        entries = [TURN] + [
            (
                coin.choice([0x100, 0x11A, 0x132, 0x8769, 0x8825, coin.randrange(65536)]),
                coin.randrange(14),
                coin.randrange(5),
                coin.randbytes(coin.choice([2, 4, 8])),
            )
            for _ in range(coin.randrange(4))
        ]
        Image.new("RGB", (32, 24)).save(file, exif=exif(sorted(entries)))
        with contextlib.suppress(AntherError):
            assert only(tmp_path).shape in ((32, 24, 3), (24, 32, 3))


@pytest.mark.parametrize(("turn", "corner"), [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 2), (7, 3), (8, 1), (99, 0)])
def test_each_orientation(tmp_path: Path, turn: int, corner: int) -> None:
    """Corners are numbered in reading order; the EXIF standard defines which one is shown at the upper left."""
    pixels = np.zeros((16, 24), np.uint8)
    for number, (y, x) in enumerate([(0, 0), (0, 16), (8, 0), (8, 16)]):
        pixels[y : y + 8, x : x + 8] = 60 * (number + 1)
    image = Image.fromarray(pixels)
    info = image.getexif()
    info[0x112] = turn
    image.save(new_picture(tmp_path), exif=info)
    result = only(tmp_path)
    assert result[0, 0] == 60 * (corner + 1)
    assert result.shape == ((24, 16) if turn in (5, 6, 7, 8) else (16, 24))


def png(width: int, height: int) -> bytes:
    """Return a black PNG with 1 bit per pixel, made without Pillow."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(b"\0" * ((width + 7) // 8 + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 10000, 20000, 40000])
def test_too_many_pixels_are_refused(tmp_path: Path, side: int) -> None:
    assert side**2 > MAX_PIXELS
    new_picture(tmp_path).write_bytes(png(side, side))
    with pytest.raises(AntherError, match=r"a\.png: too many pixels.*; save a smaller copy"):
        load_folder(tmp_path)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps"])
def test_postscript_is_never_interpreted(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    new_picture(tmp_path, name).write_bytes(EPS)
    with pytest.raises(AntherError, match=f"{name}: can't be read as a picture"):
        load_folder(tmp_path)
    assert started == []


@pytest.mark.parametrize("kind", ["DDS", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI"])
def test_other_decoders_are_never_used(tmp_path: Path, kind: str) -> None:
    file = new_picture(tmp_path)
    try:
        Image.new("RGB", (16, 16)).save(file, format=kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(AntherError, match=r"a\.png: can't be read as a picture"):
        load_folder(tmp_path)


def test_pixels_stay_on_disk(tmp_path: Path) -> None:
    file = new_picture(tmp_path)
    Image.new("L", (16, 16), 9).save(file)
    picture = load_folder(tmp_path).train[0]
    before = fingerprint([picture])
    Image.new("L", (16, 16), 8).save(file)
    assert fingerprint([load_folder(tmp_path).train[0]]) != before
    with pytest.raises(AntherError, match="was changed after the folder was read"):
        _ = picture.pixels


def test_photo_is_decoded_near_requested_size(tmp_path: Path) -> None:
    side = np.linspace(0, 255, 1024).astype(np.uint8)
    gradient = np.stack([np.broadcast_to(side, (1024, 1024)), np.broadcast_to(side[:, None], (1024, 1024))], -1)
    image = Image.fromarray(np.dstack([gradient, gradient[..., :1]]))
    for name in ("a.jpg", "a.png"):
        image.save(new_picture(tmp_path, name))
        picture = load_folder(tmp_path).train[0]
        near = picture.at_least(64)
        assert near.shape == (128, 128, 3)
        assert picture.pixels.shape == (1024, 1024, 3)
        exact = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS), float)
        result = np.asarray(Image.fromarray(near).resize((64, 64), Image.Resampling.LANCZOS), float)
        assert np.abs(result - exact).mean() < 1.5
        assert np.array_equal(picture.at_least(512), picture.pixels)
        (tmp_path / "train" / name).unlink()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("TRAINING", "train"),
        ("train_images", "train"),
        ("trainset", "train"),
        ("images-train", "train"),
        ("train2017", "train"),
        ("val", "validation"),
        ("Valid", "validation"),
        ("Validation", "validation"),
        ("dev", "validation"),
        ("val_imgs", "validation"),
        ("test", "test"),
        ("Test Images", "test"),
        ("testing", "test"),
        ("cats", None),
        ("trains", None),
        ("images", None),
        ("contest", None),
        ("train_test", None),
        ("my cat", None),
    ],
)
def test_split_names(name: str, kind: str | None) -> None:
    assert split_named(name) == kind


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Validation", "Test"),
        ("training", "val", "testing"),
        ("train_images", "valid", "test_images"),
    ],
)
@pytest.mark.parametrize("sheets", ["one", "each"])
def test_split_folders_under_other_names(tmp_path: Path, names: tuple[str, ...], sheets: str) -> None:
    lines = {}
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / name / "a.png")
        lines[name] = json.dumps({"file_name": "a.png" if sheets == "each" else f"{name}/a.png", "text": name})
        if sheets == "each":
            (tmp_path / name / "metadata.jsonl").write_text(lines[name])
    if sheets == "one":
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines.values()))
    assert [[picture.caption for picture in split] for split in load_folder(tmp_path)] == [[name] for name in names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train", "train_images"), "both look like train"),
        (("val", "validation", "train"), "both look like validation"),
        (("Trainingsdaten", "Testdaten"), "rename folders"),
        (("data/train", "data/test"), "looks like a split but is nested"),
        (("cats/train", "dogs/val"), "looks like a split but is nested"),
    ],
)
def test_ambiguous_split_folders_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    lines = []
    for name in names:
        for number in range(5):
            file = tmp_path / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9)).save(file)
            lines.append(json.dumps({"file_name": f"{name}/{number}.png", "text": name}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(AntherError, match=message):
        load_folder(tmp_path)


def gray(file: Path) -> None:
    Image.new("L", (9, 9)).save(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a\\u0000.png", "text": "x"}', "contains a NUL"),
        ('{"file_name": "a\\ud83d.png", "text": "x"}', "half a character"),
        ('{"file_name": "a.png", "text": "cat \\ud83d"}', "half a character"),
        ("[" * 100_000, "must be a JSON object"),
        ('{"file_name": ' + "9" * 5000 + "}", "must be a JSON object"),
        ('{"file_name": "' + "x" * 300 + '", "text": "x"}', "can't be a picture's name"),
        ('{"file_name": "' + "my cat " * 60 + '", "text": "a.png"}', "swapped"),
        ('{"file_name": "my cat", "text": "a.png"}', "swapped"),
        ('{"file_name": "A.PNG", "text": "x"}', "write a.png"),
        ('{"file_name": "a.png", "text": "' + "x" * 50_000 + '"}', "shorten it"),
        ('{"file_name": "two\\nlines", "text": "x"}', "doesn't exist"),
    ],
)
def test_invalid_metadata_gives_one_line(tmp_path: Path, line: str, message: str) -> None:
    gray(new_picture(tmp_path))
    (tmp_path / "train/metadata.jsonl").write_text(line)
    with pytest.raises(AntherError, match=message) as raised:
        load_folder(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-16", "UTF-16"), ("utf-32", "UTF-16"), ("latin-1", "isn't UTF-8")]
)
def test_other_encodings_are_refused(tmp_path: Path, encoding: str, message: str) -> None:
    gray(new_picture(tmp_path))
    (tmp_path / "train/metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "Größe"}'.encode(encoding))
    with pytest.raises(AntherError, match=message):
        load_folder(tmp_path)


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_unicode_normalization_of_names(tmp_path: Path, forms: tuple[str, str]) -> None:
    existing, listed_as = (unicodedata.normalize(form, "Größe é.png") for form in forms)
    gray(new_picture(tmp_path, existing, text=existing))
    line = json.dumps({"file_name": listed_as, "text": unicodedata.normalize("NFD", "Größe")})
    (tmp_path / "train/metadata.jsonl").write_text(line)
    assert load_folder(tmp_path).train[0].caption == unicodedata.normalize("NFC", "Größe")


def test_link_inside_folder_keeps_caption(tmp_path: Path) -> None:
    file = new_picture(tmp_path)
    (tmp_path / "train/store").mkdir()
    gray(tmp_path / "train/store/1.png")
    file.symlink_to("store/1.png")
    assert [picture.caption for picture in load_folder(tmp_path).train] == ["a thing"]
    line = json.dumps({"file_name": "store/1.png", "text": "again"})
    (tmp_path / "train/metadata.jsonl").write_text((tmp_path / "train/metadata.jsonl").read_text() + line)
    with pytest.raises(AntherError, match="the same file as"):
        load_folder(tmp_path)


def test_system_files_are_ignored(tmp_path: Path) -> None:
    gray(new_picture(tmp_path))
    for junk in ("train/@eaDir/a.png/THUMB.jpg", "__MACOSX/train/._a.png", "train/._a.png", "train/.thumbs/x.jpg"):
        (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / junk).write_bytes(b"x")
    (tmp_path / "train/b.png").mkdir()
    assert len(load_folder(tmp_path).train) == 1


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "HEIC", "avif", "webp"])
def test_picture_without_metadata_is_named(tmp_path: Path, suffix: str) -> None:
    gray(new_picture(tmp_path))
    (tmp_path / f"train/b.{suffix}").write_bytes(b"x")
    (tmp_path / f"train/c.{suffix}").write_bytes(b"x")
    with pytest.raises(AntherError, match=rf"b\.{suffix}: has no caption \(and 1 more\)"):
        load_folder(tmp_path)


@pytest.fixture
def another_user() -> Iterator[Path]:
    """Yield a folder that this process reads as a user other than root."""
    with tempfile.TemporaryDirectory() as folder:
        root, own = os.geteuid() == 0, Path(folder)
        own.chmod(0o755)
        if root:
            os.chown(own, 65534, -1)
            os.seteuid(65534)
        try:
            yield own
        finally:
            if root:
                os.seteuid(0)


def test_accessible_but_unlistable_folder(another_user: Path) -> None:
    gray(another_user / "0.png")
    (another_user / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    name = next(f"{number}.png" for number in range(5) if split_of(f"{number}.png") == "train")
    (another_user / "0.png").rename(another_user / name)
    (another_user / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    another_user.chmod(0o311)
    assert len(load_folder(another_user).train) == 1
    another_user.chmod(0o755)
    (another_user / "Training").mkdir()
    (another_user / name).rename(another_user / "Training" / name)
    (another_user / "metadata.jsonl").write_text(json.dumps({"file_name": f"Training/{name}", "text": "a"}))
    another_user.chmod(0o311)
    with pytest.raises(AntherError, match="can't be listed"):
        load_folder(another_user)
    another_user.chmod(0o755)


@pytest.mark.parametrize("closed", ["train", "train/metadata.jsonl", "train/a.png", "."])
def test_permission_errors_name_the_file(another_user: Path, closed: str) -> None:
    gray(new_picture(another_user / "photos"))
    index = another_user / "photos" / closed
    mode = stat.S_IMODE(index.stat().st_mode)
    index.chmod(0)
    try:
        with pytest.raises(AntherError, match="no permission"):
            load_folder(another_user / "photos")
    finally:
        index.chmod(mode)
