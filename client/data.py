"""A person's own pictures: a folder in the imagefolder convention.

`metadata.jsonl` holds one line for each picture, `{"file_name": "cat.jpg", "text": "my cat"}`. Sub-folders `train`,
`validation` and `test` split the pictures, each with its own metadata.jsonl or named in the one above; without them
each picture's name decides, so that about a fifth each is held out. Every mistake is one line that names the file and
how to mend it.

A split is a data set of its own, to train on or to measure by, each with its own noise, and ε says what one picture
more or less changes. So one picture must not move others between them: where it goes depends on it alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.errors import AntherError
from privacy.noise import stream
from training.jobs import Picture

METADATA = "metadata.jsonl"
EXAMPLE = '{"file_name": "cat.jpg", "text": "my cat"}'
SPLITS = ("train", "validation", "test")
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SMALLEST = 8  # pixels on each side


class Pictures(NamedTuple):
    """What is trained on, what decides when to stop, and what nobody trains on."""

    train: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    test: tuple[Picture, ...]


def load_folder(path: str | Path) -> Pictures:
    """Read every picture of a folder with its caption, each split in the order of names.

    Raises:
        AntherError: what is missing, damaged or not captioned, by file name.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise AntherError(f"{root}: no such folder; name the one that holds your pictures and {METADATA}")
    captions = _captions(root)
    if any((root / split).is_dir() for split in SPLITS):
        split = {name: [file for file in captions if file.split("/")[0] == name] for name in SPLITS}
        if astray := captions.keys() - {file for files in split.values() for file in files}:
            raise AntherError(f"{root / min(astray)}: lies outside {', '.join(SPLITS)}; move it into one of them")
        if not split["train"]:
            raise AntherError(f"{root / 'train'}: no pictures to train on; put some there")
    else:
        split = {name: [file for file in captions if split_of(file) == name] for name in SPLITS}
        if not split["train"]:
            raise AntherError(
                f"{root}: by their names none of the pictures ({len(captions)}) is to train on; add some, or sort them "
                f"into folders {', '.join(SPLITS)}"
            )
    found = {name: tuple(_read(root / file, captions[file]) for file in sorted(files)) for name, files in split.items()}
    return Pictures(**found)


def split_of(file: str) -> str:
    """Where a picture of this name belongs: one in five to validation and to test each, by the hash of its name.

    Names that differ in their last number alone take turns, so that of five pictures in a row each split has some. To
    guarantee that for any names, others would have to move when one is added; then neighbouring folders wouldn't be
    neighbouring data sets, and noise that hides one picture would hide too little. So a small folder may leave
    validation or test empty. One that leaves nothing to train on is an error: ε compares sets that both reach the
    owner's minimum of training pictures (`privacy.policy`).
    """
    name = Path(file).with_suffix("").as_posix()
    bare = name.rstrip("0123456789")
    turn = stream("split", bare) + int(name[len(bare) :] or 0)
    return {0: "validation", 1: "test"}.get(turn % 5, "train")


def fingerprint(pictures: Iterable[Picture]) -> str:
    """SHA-256 of the pictures and captions in their order: another for any change of them."""
    digest = hashlib.sha256()
    for pixels, caption in pictures:
        digest.update(repr((pixels.shape, len(caption.encode()), caption)).encode())
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def _captions(root: Path) -> dict[str, str]:
    """The caption of each picture by its path below `root`; every picture has one."""
    places = [root / METADATA, *(root / split / METADATA for split in SPLITS)]
    sheets = [sheet for sheet in places if sheet.is_file()]
    if not sheets:
        raise AntherError(f"{root / METADATA}: missing; write it with a line for each picture: {EXAMPLE}")
    captions: dict[str, str] = {}
    for sheet in sheets:
        for number, line in enumerate(sheet.read_bytes().splitlines(), start=1):
            if line.strip():
                file, caption = _captioned(root, sheet, number, line)
                if file in captions:
                    raise AntherError(f"{sheet}:{number}: {file} is listed twice; remove one of the lines")
                captions[file] = caption
    for picture in sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = picture.relative_to(root)
        if name.as_posix() not in captions and not any(part.startswith(".") for part in name.parts):
            raise AntherError(f"{picture}: has no caption; add a line for it to {METADATA}, or move it elsewhere")
    return captions


def _captioned(root: Path, sheet: Path, number: int, line: bytes) -> tuple[str, str]:
    """The picture's path below `root` and the caption of one line."""
    where = f"{sheet}:{number}"
    try:
        entry: Any = json.loads(line)
        file_name, caption = entry["file_name"], entry.get("text")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise AntherError(f"{where}: must be a JSON object like {EXAMPLE}") from None
    if not isinstance(file_name, str) or not file_name:
        raise AntherError(f"{where}: file_name must be the name of a picture")
    file = (sheet.parent / file_name).resolve()
    if not file.is_relative_to(root.resolve()):
        raise AntherError(f"{where}: {file_name} lies outside {root}; copy the picture into the folder")
    if not isinstance(caption, str) or not caption.strip():
        raise AntherError(f'{where}: {file_name} has no caption; write one as "text"')
    if not file.is_file():
        raise AntherError(f"{where}: {file_name} is not there; add the picture or remove the line")
    return file.relative_to(root.resolve()).as_posix(), caption.strip()


def _read(file: Path, caption: str) -> Picture:
    """One picture as it is stored, upright, grey or RGB."""
    from PIL import Image, ImageOps  # slow import, so only here

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            mode = upright.mode
            pixels = np.asarray(upright.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AntherError(f"{file}: can't be read as a picture; save it again as PNG or JPEG") from error
    if mode.startswith(("I", "F")):
        raise AntherError(f"{file}: has more than 8 bits a channel; save it as an 8-bit PNG or JPEG")
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST:
        raise AntherError(f"{file}: {width}×{height} pixels are too few; use one of at least {SMALLEST}×{SMALLEST}")
    return Picture(pixels, caption)
