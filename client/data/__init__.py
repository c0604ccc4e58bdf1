"""The owner's pictures: a folder in the imagefolder convention.

`metadata.jsonl` has one line for each picture, `{"file_name": "cat.jpg", "text": "my cat"}`; `client.data.captions` has
the other ways to give captions. Sub-folders `train`,
`validation` and `test` (or `Train`, `val`, `test_images`, …) split the pictures; each has its own metadata.jsonl, or is
listed in the one above. Without sub-folders the split depends on the picture's name: about a fifth goes to validation
and a fifth to test. Every error is one line that names the file and the remedy.

Each split is a data set of its own, for training or for evaluation, with its own noise, and ε bounds the effect of
adding or removing one picture. So a picture must not move others between splits: its split depends only on itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from client.data.captions import read_captions
from client.data.metadata import EXAMPLE, METADATA
from client.data.picture_files import OnError, PictureFiles, raise_error
from client.data.reading import WHITE
from client.data.splits import SPLITS, check_depth, split_folders, split_of
from client.data.stored_picture import MissingPicture, StoredPicture
from common.errors import AntherError, os_error
from training.jobs import Picture

__all__ = [
    "EXAMPLE",
    "METADATA",
    "SPLITS",
    "WHITE",
    "ListedPicture",
    "MissingPicture",
    "Pictures",
    "StoredPicture",
    "fingerprint",
    "list_pictures",
    "load_folder",
    "split_of",
]


class Pictures(NamedTuple):
    """Pictures for training, for early stopping, and for evaluation. The last are never trained on."""

    train: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    test: tuple[Picture, ...]


class ListedPicture(NamedTuple):
    """A picture that a folder lists, not opened yet."""

    file: Path
    caption: str  # the first, if it has several
    split: str | None
    """Split of its sub-folder; None: the folder isn't split."""


def load_folder(
    path: str | Path, *, background: str = WHITE, caption: str | None = None, on_error: OnError = raise_error
) -> Pictures:
    """Find every picture of a folder with its caption; each split is sorted by name.

    Each file is hashed, and decoded once to verify that it can be; no pixels are kept.

    Args:
        path: the folder.
        background: color behind transparent parts of a picture.
        caption: one caption for all pictures, or with `{text}` a text around each picture's own; None: their own.
        on_error: called with each mistake; raises it by default. If it returns, a listed picture that can't be used is
            replaced by a `MissingPicture`, and a folder without pictures gives none.

    Raises:
        AntherError: a file is missing, damaged or has no caption; the message names it.
    """
    root = Path(path).expanduser()
    try:
        if path == "":
            raise AntherError("a folder of pictures has an empty name; write . for the current folder")
        if "\0" in str(path) or not root.is_dir():
            raise AntherError(f"{root}: no such folder; name the one that holds your pictures and {METADATA}")
        return _load(root, background, caption, on_error)
    except OSError as error:
        mistake = os_error(error, root)
    except AntherError as error:
        mistake = error
    on_error(mistake)
    return Pictures((), (), ())


def list_pictures(path: str | Path) -> list[ListedPicture]:
    """List the pictures of a folder, sorted by name, without opening them.

    Raises:
        AntherError: as for `load_folder`, except for pictures that can't be read.
    """
    root = Path(path)
    try:
        splits = split_folders(root, _folders(root))
        captions = read_captions(PictureFiles(root), splits.values())
        if not splits:
            check_depth(root, captions)
    except OSError as error:
        raise os_error(error, root) from error
    split_of_folder = {folder: split for split, folder in splits.items()}
    if splits and (outside := [file for file in captions if file.split("/")[0] not in split_of_folder]):
        raise AntherError(f"{root / min(outside)}: lies outside {', '.join(split_of_folder)}; move it into one of them")
    return [
        ListedPicture(root / file, texts[0] if texts else "", split_of_folder.get(file.split("/")[0]))
        for file, texts in sorted(captions.items())
    ]


def _load(root: Path, background: str, template: str | None, on_error: OnError) -> Pictures:
    splits = split_folders(root, _folders(root))
    files = PictureFiles(root)
    caption_of = read_captions(files, splits.values(), on_error, template=template)
    names = {name: splits.get(name, name) for name in SPLITS}
    if splits:
        split = {name: [file for file in caption_of if file.split("/")[0] == folder] for name, folder in names.items()}
        if outside := caption_of.keys() - {file for files in split.values() for file in files}:
            folders = ", ".join(names.values())
            on_error(AntherError(f"{root / min(outside)}: lies outside {folders}; move it into one of them"))
        if not split["train"]:
            on_error(AntherError(f"{root / names['train']}: no pictures to train on; put some there"))
    else:
        check_depth(root, caption_of)
        split = {name: [file for file in caption_of if split_of(file) == name] for name in SPLITS}
        if not split["train"]:
            on_error(
                AntherError(
                    f"{root}: split by their names, none of the {len(caption_of)} pictures is for training; add some, "
                    f"or sort them into folders {', '.join(SPLITS)}"
                )
            )

    def picture(file: str) -> Picture:
        captions = caption_of[file]
        try:
            if captions is None:
                return MissingPicture()
            return StoredPicture(
                root / file,
                captions[0],
                background=background,
                further_captions=captions[1:],
                mask=root / mask if (mask := files.masks.get(file)) else None,
            )
        except AntherError as error:
            on_error(error)
            return MissingPicture()

    return Pictures(*(tuple(map(picture, sorted(split[name]))) for name in SPLITS))


def _folders(root: Path) -> list[str]:
    """List the folders in the root; if the root can't be listed, only those that have the exact name of a split."""
    try:
        return [path.name for path in root.iterdir() if path.is_dir()]
    except PermissionError:
        if not os.access(root, os.X_OK):
            raise
        return [name for name in SPLITS if (root / name).is_dir()]


def fingerprint(pictures: Iterable[Picture]) -> str:
    """Return the SHA-256 of the pictures and captions in their order."""
    digest = hashlib.sha256()
    for picture in pictures:
        for part in picture.content():
            digest.update(part)
    return digest.hexdigest()
