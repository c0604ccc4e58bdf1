"""Files of a folder of pictures: names, suffixes, and the files that are not the owner's pictures."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

from common.errors import AntherError

HEIF = (".heic", ".heif", ".hif")
SUPPORTED = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *HEIF)
"""Suffixes of supported pictures."""
UNSUPPORTED = (".jxl",)
"""Suffixes of unsupported pictures: a missing caption is reported for these too, so that none is skipped silently."""
MASK = ".mask.png"
"""End of the name of a picture's mask, in place of its suffix."""
JUNK = {"@eadir", "__macosx", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini", "system volume information"}
"""Files that operating systems create in folders of pictures, in addition to names that begin with a dot."""

OnError = Callable[[AntherError], None]
"""Callback for a mistake. If it returns, the picture counts as missing."""


def raise_error(error: AntherError) -> None:
    """Raise the first mistake."""
    raise error


class PictureFiles:
    """Files below a folder, without hidden files and files that operating systems create."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted paths of all files relative to the root, with '/' between their parts."""
        return tuple(sorted(self._walk()))

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """The names that have the suffix of a picture, supported or not; without masks."""
        masks = set(self.masks.values())
        return tuple(name for name in self._all_pictures if name not in masks)

    @cached_property
    def masks(self) -> dict[str, str]:
        """The mask of each picture that has one: `cat.mask.png` of `cat.jpg`."""
        names = set(self.names)
        named = {name: str(PurePosixPath(name).with_suffix(MASK)) for name in self._all_pictures}
        return {name: mask for name, mask in named.items() if mask in names}

    @cached_property
    def _all_pictures(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name.lower().endswith((*SUPPORTED, *UNSUPPORTED)))

    @cached_property
    def _by_form(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.names:
            names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return names

    def normalized(self, name: str) -> str | None:
        """Return the only file whose name differs just in Unicode normalization (macOS decomposes accents)."""
        matches = self._by_form.get(unicodedata.normalize("NFC", name), [])
        return matches[0] if len(matches) == 1 else None

    def similar(self, name: str) -> str | None:
        """Return a file whose name differs only in letter case or in the path separator."""
        folded = _case_folded(name)
        return next((file for file in self.names if _case_folded(file) == folded), None)

    def _walk(self) -> Iterator[str]:
        def failed(error: OSError) -> None:
            if not (isinstance(error, PermissionError) and Path(error.filename) == self.root):
                raise error  # a root may be accessible but not listable: then metadata.jsonl names its files

        for folder, folders, files in os.walk(self.root, onerror=failed):
            folders[:] = sorted(name for name in folders if not is_junk(name))
            relative = Path(folder).relative_to(self.root)
            yield from ((relative / name).as_posix() for name in files if not is_junk(name))


def is_junk(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or was created by an operating system."""
    return name.startswith(".") or name.casefold() in JUNK


def _case_folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/")
