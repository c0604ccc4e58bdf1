"""Assign pictures to splits, by their folder or else by their name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from common.errors import AntherError, shorten
from common.seeding import derive_seed

SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "dev": "validation",
    "development": "validation",
    "test": "test",
    "tests": "test",
    "testing": "test",
    "tst": "test",
    "eval": "test",
    "evaluation": "test",
}
_NEUTRAL_WORDS = {
    "data",
    "dataset",
    "file",
    "files",
    "folder",
    "image",
    "images",
    "img",
    "imgs",
    "photo",
    "photos",
    "pic",
    "pics",
    "picture",
    "pictures",
    "set",
    "split",
    "subset",
}
_PREFIXES = {"train": "train", "trn": "train", "val": "validation", "test": "test", "eval": "test"}


def split_of(file: str) -> str:
    """Return a picture's split by the hash of its name: one in five goes to validation, and one in five to test.

    Names that differ only in their last number take turns, so that five consecutive pictures reach every split. To
    guarantee this for all names, adding one picture would have to move others. Neighboring folders would then not be
    neighboring data sets, and noise calibrated to one picture would hide too little. So a small folder may have no
    validation or test pictures. A folder without training pictures is an error: ε compares data sets that both reach
    the owner's minimum of training pictures (`privacy.policy`).
    """
    name = Path(file).with_suffix("").as_posix()
    stem = name.rstrip("0123456789")
    key = os.fsencode(stem).decode("utf-8", "backslashreplace")  # names may have any bytes
    position = derive_seed("split", key) + int(name[len(stem) :] or 0)
    return {0: "validation", 1: "test"}.get(position % 5, "train")


def split_named(folder: str) -> str | None:
    """Return the split that a folder name denotes, in upper or lower case (`Train`, `val`, `test_images`, `train2017`),
    or None.
    """
    words = [word for word in re.split(r"[^a-z]+", _case_folded(folder)) if word]
    bare = [word for word in words if word not in _NEUTRAL_WORDS]
    if len(bare) != 1:
        return None
    word = bare[0]
    if word not in _SPLIT_WORDS:  # trainset, valimages
        word = next((word.removesuffix(end) for end in sorted(_NEUTRAL_WORDS) if word.endswith(end)), word)
    return _SPLIT_WORDS.get(word)


def split_folders(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """Find the split folders of `root`: {split: folder}, in the order of `SPLITS`; empty if there are none.

    Raises:
        AntherError: two folders denote the same split, or a name looks like a split but is ambiguous.
    """
    names = sorted(folders)
    folders_of: dict[str, list[str]] = {}
    for name in names:
        if (split := split_named(name)) is not None:
            folders_of.setdefault(split, []).append(name)
    for split, matches in folders_of.items():
        if len(matches) > 1:
            raise AntherError(f"{root}: {' and '.join(map(shorten, matches))} both look like {split}: keep one of them")
    ambiguous = {name: split for name in names if split_named(name) is None and (split := _possible_split(name))}
    if ambiguous and len({*ambiguous.values(), *folders_of}) > 1:
        listed = ", ".join(map(shorten, ambiguous))
        raise AntherError(f"{root}: {listed}: look like splits: rename folders to {', '.join(SPLITS)}")
    return {split: folders_of[split][0] for split in SPLITS if split in folders_of}


def check_depth(root: Path, files: Collection[str]) -> None:
    """Refuse nested split folders (`cats/train/1.jpg`): their pictures would be split by name instead.

    Raises:
        AntherError: there is such a picture; the message names the first.
    """
    for file in sorted(files):
        folders = PurePosixPath(file).parts[:-1]
        if any(split_named(folder) is not None for folder in folders):
            raise AntherError(
                f"{root / shorten(file)}: lies in a folder that looks like a split but is nested, or whose parent "
                f"can't be listed: move {', '.join(SPLITS)} directly into the folder that you name, and make it "
                "listable"
            )


def _possible_split(folder: str) -> str | None:
    return next((split for word, split in _PREFIXES.items() if _case_folded(folder).startswith(word)), None)


def _case_folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
