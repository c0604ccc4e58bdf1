"""Random, damaged folders of pictures, caption sheets and EXIF blocks for `bench.robustness.fuzz_inputs`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import unicodedata
import zlib
from functools import cache
from pathlib import Path

from PIL import Image, ImageCms

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "DDS", "ICO", "PPM", "TGA", "EPS", "PDF", "JPEG2000")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".avif", ".eps")


def picture(rng: random.Random, folder: Path) -> None:
    """Write a small picture of a random format and mode, possibly damaged, under a random suffix."""
    name = f"a{rng.choice(SUFFIXES)}"
    _write(folder, name, damaged(rng, _encoded(rng)))
    _sheet(folder, [{"file_name": name, "text": "a picture"}])


def exif(rng: random.Random, folder: Path) -> None:
    """Write a rotated picture with a random EXIF block."""
    entries = [(0x112, 3, 1, bytes([rng.randrange(10), 0]))]
    for _ in range(rng.randrange(6)):
        tag = rng.choice([0x100, 0x101, 0x11A, 0x11B, 0x132, 0x213, 0x8769, 0x8825, 0xA005, rng.randrange(65536)])
        count = rng.choice([0, 1, 1, 2, 4, 1 << 16, (1 << 32) - 1])
        entries.append((tag, rng.randrange(15), count, rng.randbytes(rng.choice([2, 4, 8, 16]))))
    order = rng.choice(["little", "big"])
    block = b"Exif\0\0" + _block(sorted(entries), order)
    block = damaged(rng, block, least=8) if rng.random() < 0.5 else block
    kind = rng.choice(["JPEG", "PNG", "WEBP", "TIFF"])
    buffer = io.BytesIO()
    try:
        Image.new("RGB", (32, 24)).save(buffer, kind, exif=block[:60_000])
    except Exception:  # Pillow parses the EXIF block when it writes TIFF
        Image.new("RGB", (32, 24)).save(buffer, "JPEG", exif=block[:60_000])
    _write(folder, "a.jpg", buffer.getvalue())
    _sheet(folder, [{"file_name": "a.jpg", "text": "turned"}])


def sheet(rng: random.Random, folder: Path) -> None:
    """Write a caption sheet with damaged text, bytes or encoding."""
    names = [rng.choice(_NAMES) for _ in range(rng.randrange(1, 5))]
    for name in names:
        _put(folder, name)
    lines = [{"file_name": name, "text": rng.choice(_TEXTS)} for name in names]
    for line in lines:
        if rng.random() < 0.3:
            line[rng.choice(["file_name", "text", "prompt", ""])] = rng.choice(_VALUES)  # type: ignore[assignment]
        if rng.random() < 0.1:
            line.pop(rng.choice(list(line)))
    text = rng.choice(["\n", "\r\n", "\n\n"]).join(json.dumps(line, ensure_ascii=rng.random() < 0.5) for line in lines)
    encoding = rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    _write(folder, "metadata.jsonl", damaged(rng, data) if rng.random() < 0.6 else data)


def texts(rng: random.Random, folder: Path) -> None:
    """Write pictures with text files, masks and a CSV file beside them, possibly damaged."""
    for name in {rng.choice(_NAMES) for _ in range(rng.randrange(1, 4))}:
        _put(folder, name)
        stem = name.rpartition(".")[0]
        if rng.random() < 0.8:
            _write(folder, f"{stem}.txt", damaged(rng, rng.choice(_TEXTS).encode()))
        if rng.random() < 0.3:
            _write(folder, f"{stem}.mask.png", damaged(rng, _encoded(rng)))
        if rng.random() < 0.3:
            row = f'file_name,text\r\n"{name}","{rng.choice(_TEXTS)}"\r\n'
            _write(folder, "metadata.csv", damaged(rng, row.encode()))


def layout(rng: random.Random, folder: Path) -> None:
    """Write nested folders with links, junk files, and sheets in some of them."""
    subfolders = [rng.choice(_FOLDERS) for _ in range(rng.randrange(1, 5))]
    lines = []
    for subfolder in subfolders:
        name = f"{subfolder}/{rng.choice(_NAMES)}".lstrip("/")
        _put(folder, name)
        if rng.random() < 0.85:
            lines.append({"file_name": name, "text": rng.choice(_TEXTS)})
        if rng.random() < 0.3:
            _sheet(folder, [{"file_name": Path(name).name, "text": "beside it"}], subfolder)
        if rng.random() < 0.3:
            link = folder / subfolder / rng.choice(["link.png", "metadata.jsonl", "b.png", "loop"])
            target = rng.choice(["a.png", "..", str(_outside(folder)), "nowhere", "link.png"])
            with contextlib.suppress(OSError):  # the name exists, or a picture is in the way
                link.symlink_to(target)
    if rng.random() < 0.9:
        _sheet(folder, lines)


def damaged(rng: random.Random, data: bytes, least: int = 0) -> bytes:
    """Change, cut, duplicate or move some bytes, or sometimes return them unchanged.

    Args:
        rng: source of randomness.
        data: the bytes.
        least: number of first bytes to keep.
    """
    damaged_data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 4, 16])):
        if len(damaged_data) <= least + 1:
            break
        at = rng.randrange(least, len(damaged_data))
        match rng.randrange(6):
            case 0:
                damaged_data[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged_data[at] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                del damaged_data[at:]
            case 3:
                del damaged_data[at : at + rng.randrange(1, 64)]
            case 4:
                damaged_data[at:at] = rng.randbytes(rng.randrange(1, 32))
            case 5:
                damaged_data[at : at + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0"])
    return _checked(bytes(damaged_data)) if rng.random() < 0.5 else bytes(damaged_data)


def _encoded(rng: random.Random) -> bytes:
    """Return a picture of a random format and mode that Pillow can write."""
    while True:
        buffer = io.BytesIO()
        kind, mode = rng.choice(FORMATS), rng.choice(MODES)
        size = (rng.randrange(1, 64), rng.randrange(1, 64))
        options: dict[str, object] = {}
        if kind in ("PNG", "GIF") and rng.random() < 0.3:
            options["transparency"] = 0
        if kind in ("GIF", "WEBP", "TIFF", "PNG") and rng.random() < 0.2:
            options |= {"save_all": True, "append_images": [Image.new(mode, size)]}
        if rng.random() < 0.3:
            options["icc_profile"] = damaged(rng, _profile())
        if kind == "JPEG" and rng.random() < 0.5:
            options["progressive"] = True
        try:
            Image.new(mode, size, rng.choice([0, 1])).save(buffer, kind, **options)
        except Exception:  # the format does not have this mode
            continue
        return buffer.getvalue()


@cache
def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _checked(data: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, so that they don't expose the damage."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        out += data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return bytes(out) + data[at:]


def _block(entries: list[tuple[int, int, int, bytes]], order: str) -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)  # type: ignore[arg-type]

    head, tail, at = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        field = value.ljust(4, b"\0") if len(value) <= 4 else number(at + len(tail), 4)
        tail += value if len(value) > 4 else b""
        head += number(tag, 2) + number(kind, 2) + number(count, 4) + field
    start = b"II*\0" if order == "little" else b"MM\0*"
    return start + number(8, 4) + number(len(entries), 2) + head + number(0, 4) + tail


_NAMES = (
    "a.png",
    "b.png",
    "Größe.png",
    unicodedata.normalize("NFD", "é.png"),
    "A.PNG",
    "with space.png",
    "写真.png",
    ".hidden.png",
    "._a.png",
    "a'b.png",
    "tab\tin.png",
    "new\nline.png",
    "x" * 200 + ".png",
    "b.heic",
    "c.txt",
)
_FOLDERS = (
    "",
    "train",
    "Train",
    "val",
    "validation",
    "test",
    "cats",
    "cats/train",
    "@eaDir",
    "__MACOSX",
    ".git",
    "train_images",
    "test set",
    "a.png",
    "deep/er/still",
)
_TEXTS = ("a cat", " ", "", "Größe", "line\nbreak", "\x1b[2J", "word " * 3000, "a.png", "\u2028", "😀")
_VALUES: tuple[object, ...] = (
    None,
    3,
    1.5,
    True,
    [],
    {},
    ["a.png"],
    "a\0.png",
    "\ud83d",
    "../a.png",
    "/etc/passwd",
    "",
    ".",
    "..",
    "x" * 5000,
    "a.png/",
    "~/a.png",
    "$HOME",
    "a\\b.png",
    "nul",
    10**30,
)


def _outside(folder: Path) -> Path:
    """Create a target for links out of the folder, in the case's scratch folder; never an existing file."""
    file = folder.parent / "outside.txt"
    file.write_text("not a picture")
    return file


def _write(root: Path, name: str, data: bytes) -> None:
    """Write a file below `root`, if the name is possible.

    Links are never followed: their target doesn't belong to the generator, which may run as root.

    Args:
        root: folder of the case.
        name: path of the file below it.
        data: content of the file.
    """
    path, top = root / name, root.resolve()
    with contextlib.suppress(OSError):  # a picture or a link is in the way
        for folder in [*reversed(path.relative_to(root).parents), path.relative_to(root)]:
            if (root / folder).is_symlink():
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(top):
            raise ValueError(f"{path} leads out of {root}")
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "wb") as file:
            file.write(data)


def _put(root: Path, name: str) -> None:
    """Write a small picture with this name."""
    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, "PNG")
    _write(root, name, buffer.getvalue())


def _sheet(root: Path, lines: list[dict[str, str]], subfolder: str = "") -> None:
    """Write a caption sheet in a folder below `root`.

    Args:
        root: folder of the case.
        lines: lines of the sheet.
        subfolder: folder of the sheet below `root`.
    """
    text = "".join(json.dumps(line) + "\n" for line in lines)
    _write(root, f"{subfolder}/metadata.jsonl".lstrip("/"), text.encode())
