"""Inspect a folder of pictures as training reads it: the use of each file, and the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from client.data import Pictures, StoredPicture, load_folder
from client.data.captions import text_files
from client.data.metadata import METADATA, METADATA_CSV, find_sheets, read_sheets
from client.data.picture_files import PictureFiles, is_junk
from client.data.reading import WHITE, decode, open_picture
from common.errors import AntherError, one_line

USED, CONVERTED, SKIPPED, REFUSED = "used", "converted", "skipped", "refused"
Size = tuple[int, int]


class FileVerdict(NamedTuple):
    """The use of one file."""

    file: str  # path below the folder
    verdict: str  # USED, CONVERTED, SKIPPED or REFUSED
    reason: str  # conversions, or why it isn't used
    split: str = ""
    size: Size | None = None  # width and height in pixels, upright
    captions: tuple[str, ...] = ()
    tokens_cut: int = 0  # most tokens of a caption that no text encoder reads
    picture: StoredPicture | None = None

    def __str__(self) -> str:
        """Return one line: verdict, file, and the details."""
        details = [self.split] if self.split else []
        details += [f"{self.size[0]}×{self.size[1]}"] if self.size else []
        details += [self.reason] if self.reason else []
        details += [" | ".join(f'"{caption}"' for caption in self.captions)] if self.captions else []
        if self.tokens_cut:
            details.append(f"the caption is too long for the text encoder: its last {self.tokens_cut} tokens are cut")
        return one_line(f"{self.verdict:<9}  {self.file}: {'; '.join(details)}")


class FolderVerdict(NamedTuple):
    """The use of all files of a folder."""

    files: list[FileVerdict]
    mistakes: list[str]  # that concern no single file
    counts: dict[str, int]  # pictures by split

    @property
    def usable(self) -> bool:
        """Whether training can start."""
        return not self.mistakes and not any(file.verdict == REFUSED for file in self.files)


def inspect_folder(
    path: str | Path,
    *,
    background: str = WHITE,
    caption: str | None = None,
    count_cut: Callable[[str], int] = lambda _: 0,
) -> FolderVerdict:
    """Inspect each file of a folder.

    Args:
        path: the folder.
        background: color behind transparent parts of a picture.
        caption: one caption for all pictures, or with `{text}` a text around each picture's own; None: their own.
        count_cut: returns the number of a caption's tokens that no text encoder reads.
    """
    root = Path(path).expanduser()
    errors: list[AntherError] = []
    pictures = load_folder(path, background=background, caption=caption, on_error=errors.append)
    mistakes = [str(error) for error in errors]
    found = [
        _describe(root, split, picture, count_cut)
        for split, part in zip(Pictures._fields, pictures, strict=True)
        for picture in part
        if isinstance(picture, StoredPicture)
    ]
    if root.is_dir():
        found += _unused(root, {file.file for file in found}, mistakes)
    counts = {split: len(part) for split, part in zip(Pictures._fields, pictures, strict=True)}
    return FolderVerdict(sorted(found, key=lambda file: file.file), mistakes, counts)


def _describe(root: Path, split: str, picture: StoredPicture, count_cut: Callable[[str], int]) -> FileVerdict:
    notes: list[str] = []
    with open_picture(picture.path) as file:
        height, width = decode(picture.path, file, background=picture.background, notes=notes).shape[:2]
    used = [*notes, *(["weighted by its mask"] if picture.mask_path else [])]
    return FileVerdict(
        file=os.path.relpath(picture.path, root),
        verdict=CONVERTED if notes else USED,
        reason=", ".join(used),
        split=split,
        size=(width, height),
        captions=picture.captions,
        tokens_cut=max(map(count_cut, picture.captions)),
        picture=picture,
    )


def _unused(root: Path, used: set[str], mistakes: list[str]) -> Iterator[FileVerdict]:
    """Yield the files that aren't used; mistakes about one of them are removed from the list."""
    files = PictureFiles(root)
    real = {os.path.realpath(root / name): name for name in used}
    pictures, texts = set(files.pictures), {text: name for name, text in text_files(files).items()}
    listed = read_sheets(files, find_sheets(files, ()), lambda _: None)[0]
    for name in sorted({*files.names, *_junk(root)}):
        where = one_line(f"{root / name}: ")
        own = next((mistake for mistake in mistakes if mistake.startswith(where)), None)
        if own is not None:
            mistakes.remove(own)
            yield FileVerdict(name, REFUSED, own.removeprefix(where))
        elif name in used or name in files.masks.values() or PurePosixPath(name).name in (METADATA, METADATA_CSV):
            continue
        elif name in pictures:
            same = real.get(os.path.realpath(root / name))
            reason = f"the same file as {same}" if same else "has no caption"
            yield FileVerdict(name, SKIPPED if same else REFUSED, reason)
        elif name in texts:
            if texts[name] in listed:
                yield FileVerdict(name, SKIPPED, f"{texts[name]} has another caption")
        else:
            parts = PurePosixPath(name).parts
            hidden = any(map(is_junk, parts))
            yield FileVerdict(name, SKIPPED, "hidden, or of the operating system" if hidden else "not a picture")


def _junk(root: Path) -> Iterator[str]:
    """Yield hidden files and files of operating systems; a folder of them is one entry."""
    for folder, folders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in (*folders, *files) if is_junk(name))
        folders[:] = [name for name in folders if not is_junk(name)]
