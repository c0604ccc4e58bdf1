"""Assign pictures to splits: by their folder, or else by their name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from common.errors import AntherError, shown
from common.seeding import derive_seed

SPLITS = ("train", "validation", "test")
_WORDS = {
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
_NEUTRAL = {
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
_BEGINNINGS = {"train": "train", "trn": "train", "val": "validation", "test": "test", "eval": "test"}


def split_of(file: str) -> str:
    """Return the split of a picture by the hash of its name: one in five goes to validation, and one in five to test.

    Names that differ only in their last number alternate, so that five consecutive pictures reach every split. To
    guarantee this for arbitrary names, adding one picture would have to move others. Then neighboring folders would
    not be neighboring data sets, and noise calibrated to one picture would hide too little. So a small folder may leave
    validation or test empty. A folder without training pictures is an error: ε compares data sets that both reach the
    owner's minimum of training pictures (`privacy.policy`).
    """
    name = Path(file).with_suffix("").as_posix()
    bare = name.rstrip("0123456789")
    turn = derive_seed("split", bare) + int(name[len(bare) :] or 0)
    return {0: "validation", 1: "test"}.get(turn % 5, "train")


def kind_of(folder: str) -> str | None:
    """Return the split that a folder name means in any case (`Train`, `val`, `test_images`, `train2017`), or None."""
    words = [word for word in re.split(r"[^a-z]+", _plain(folder)) if word]
    bare = [word for word in words if word not in _NEUTRAL]
    if len(bare) != 1:
        return None
    word = bare[0]
    if word not in _WORDS:  # trainset, valimages
        word = next((word.removesuffix(end) for end in sorted(_NEUTRAL) if word.endswith(end)), word)
    return _WORDS.get(word)


def split_folders(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """Find the split folders of `root`: {split: folder}, in the order of `SPLITS`; empty if there are none.

    Raises:
        AntherError: two folders mean the same split, or a name looks like a split but is ambiguous.
    """
    names = sorted(folders)
    found: dict[str, list[str]] = {}
    for name in names:
        if (kind := kind_of(name)) is not None:
            found.setdefault(kind, []).append(name)
    for kind, same in found.items():
        if len(same) > 1:
            raise AntherError(f"{root}: {' and '.join(map(shown, same))} both look like {kind}: keep one of them")
    likely = {name: kind for name in names if kind_of(name) is None and (kind := _likely(name))}
    if likely and len({*likely.values(), *found}) > 1:
        listed = ", ".join(map(shown, likely))
        raise AntherError(f"{root}: {listed}: look like splits: rename folders to {', '.join(SPLITS)}")
    return {kind: found[kind][0] for kind in SPLITS if kind in found}


def check_depth(root: Path, files: Collection[str]) -> None:
    """Refuse nested split folders (`cats/train/1.jpg`): their pictures would be split by name instead.

    Raises:
        AntherError: there is such a picture; the message names the first.
    """
    for file in sorted(files):
        folders = PurePosixPath(file).parts[:-1]
        if any(kind_of(folder) is not None for folder in folders):
            raise AntherError(
                f"{root / shown(file)}: lies in a folder that looks like a split, further down or in a folder that "
                f"can't be listed: move {', '.join(SPLITS)} directly into the one that you name, and let it be listed"
            )


def _likely(folder: str) -> str | None:
    return next((kind for word, kind in _BEGINNINGS.items() if _plain(folder).startswith(word)), None)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
