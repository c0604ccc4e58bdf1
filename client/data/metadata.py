"""Read `metadata.jsonl`, which has the caption of each picture in a folder."""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import AntherError, os_error, shorten

METADATA = "metadata.jsonl"
EXAMPLE = '{"file_name": "cat.jpg", "text": "my cat"}'
HEIF = (".heic", ".heif", ".hif")
SUPPORTED = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *HEIF)
"""Suffixes of supported pictures."""
UNSUPPORTED = (".jxl",)
"""Suffixes of unsupported pictures: a missing caption is reported for these too, so that none is skipped silently."""
JUNK = {"@eadir", "__macosx", "$recycle.bin", "lost+found", "thumbs.db", "system volume information"}
"""Files that operating systems create in folders of pictures, in addition to names that begin with a dot."""
MAX_SHEET_BYTES = 64 * 2**20  # bytes of a metadata file
MAX_CAPTION = 20_000  # characters

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
            folders[:] = sorted(name for name in folders if not _is_junk(name))
            relative = Path(folder).relative_to(self.root)
            yield from ((relative / name).as_posix() for name in files if not _is_junk(name))


def read_captions(
    files: PictureFiles, folders: Iterable[str], on_error: OnError = raise_error
) -> dict[str, str | None]:
    """Read the caption of each picture, by its path relative to the root; None for a listed picture that can't be used.

    Args:
        files: the folder's files.
        folders: sub-folders of the root that may have a metadata file of their own.
        on_error: called with each mistake.
    """
    root = files.root
    paths = [root / METADATA, *(root / folder / METADATA for folder in folders)]
    sheets = [sheet for sheet in paths if sheet.is_file()]
    if not sheets:
        raise AntherError(f"{root / METADATA}: missing; write it with a line for each picture: {EXAMPLE}")
    caption_of: dict[str, str | None] = {}
    listed_as: dict[str, str] = {}  # real file -> the listed path that leads to it
    for sheet in sheets:
        try:
            for number, line in _lines(sheet):
                try:
                    file, caption = _parse_line(files, sheet, number, line)
                    target = os.path.realpath(root / file)
                    if file in caption_of or target in listed_as:
                        same = "" if file in caption_of else f" (the same file as {shorten(listed_as[target])}"
                        raise AntherError(
                            f"{sheet}:{number}: {shorten(file)} is listed twice{same}; remove one of the lines"
                        )
                    caption_of[file], listed_as[target] = caption, file
                except AntherError as error:
                    on_error(error)
                    if (listed := _listed_path(root, sheet, line)) is not None:
                        caption_of.setdefault(listed, None)
        except AntherError as error:  # the file can't be used at all
            on_error(error)
    try:
        _check_all_captioned(files, caption_of, listed_as)
    except AntherError as error:
        on_error(error)
    return caption_of


def _listed_path(root: Path, sheet: Path, line: str) -> str | None:
    """Return the path relative to the root that a line names, whether or not the picture exists."""
    try:
        return Path(os.path.relpath(sheet.parent / json.loads(line)["file_name"], root)).as_posix()
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _check_all_captioned(
    files: PictureFiles, caption_of: Mapping[str, str | None], listed_as: Mapping[str, str]
) -> None:
    root, pictures = (
        files.root.resolve(),
        (name for name in files.names if name.lower().endswith((*SUPPORTED, *UNSUPPORTED))),
    )
    without = [name for name in pictures if name not in caption_of and str(root / name) not in listed_as]
    if not without:
        return
    more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
    line = f"has no caption{more}; add a line for it to {METADATA}, or move it elsewhere"
    if without[0].lower().endswith(UNSUPPORTED):
        line = f"has no caption{more}, and can't be read: save it as JPEG and add a line for that, or move it elsewhere"
    raise AntherError(f"{files.root / shorten(without[0])}: {line}")


def _lines(sheet: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that isn't blank."""
    if sheet.stat().st_size > MAX_SHEET_BYTES:
        raise AntherError(f"{sheet}: over {MAX_SHEET_BYTES // 2**20} MiB, too large for captions; split the folder")
    data = sheet.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise AntherError(f"{sheet}: is UTF-16 or UTF-32 text; save it as UTF-8")
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise AntherError(
                    f"{sheet}:{number}: byte {error.start + 1} isn't UTF-8 text; save the file as UTF-8"
                ) from None


def _parse_line(files: PictureFiles, sheet: Path, number: int, line: str) -> tuple[str, str]:
    """Parse one line: the picture's path relative to the root, and its caption.

    Args:
        files: the folder's files.
        sheet: path of the metadata file.
        number: line number, for messages.
        line: the line's text.
    """
    where = f"{sheet}:{number}"
    try:
        entry: Any = json.loads(line)
        file_name, caption = entry["file_name"], entry.get("text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AntherError(f"{where}: must be a JSON object like {EXAMPLE}") from None
    if not isinstance(file_name, str) or not file_name:
        raise AntherError(f"{where}: file_name must be the name of a picture")
    name = shorten(file_name)
    if not isinstance(caption, str) or not caption.strip():
        raise AntherError(f'{where}: {name} has no caption; write one as "text"')
    try:
        return _resolve(files, sheet.parent, file_name, where), _clean_caption(
            caption, f"{where}: the caption of {name}"
        )
    except AntherError as error:
        if _is_picture(sheet.parent, caption):
            raise AntherError(f"{where}: file_name and text are swapped: write {EXAMPLE}") from error
        raise


def _clean_caption(caption: str, what: str) -> str:
    """Strip a caption and normalize its Unicode."""
    if len(caption) > MAX_CAPTION:
        raise AntherError(f"{what} has {len(caption):,} characters; shorten it to {MAX_CAPTION:,}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise AntherError(f"{what} contains half a character (an unpaired surrogate); write it again") from None
    return unicodedata.normalize("NFC", caption.strip())


def _resolve(files: PictureFiles, folder: Path, file_name: str, where: str) -> str:
    """Resolve a listed file name to the picture's path relative to the root.

    Args:
        files: the folder's files.
        folder: folder of the metadata file.
        file_name: the name as listed.
        where: file and line, for messages.
    """
    name, root = shorten(file_name), files.root
    try:
        os.fsencode(file_name.encode().decode())
    except UnicodeEncodeError:
        raise AntherError(f"{where}: file_name {name} contains half a character; write the picture's name") from None
    if "\0" in file_name:
        raise AntherError(f"{where}: file_name {name} contains a NUL; write the picture's name")
    relative = os.path.normpath(os.path.relpath(folder / file_name, root))
    outside = AntherError(f"{where}: {name} lies outside {root}; copy the picture into the folder")
    if relative.startswith(".."):  # listed by its full path, possibly through a link
        relative = os.path.relpath(os.path.realpath(folder / file_name), root.resolve())
    if relative == ".." or relative.startswith("../"):
        raise outside
    file = Path(relative).as_posix()
    try:
        status = _stat(root / file)
        if status is None and (normalized := files.normalized(file)) is not None:
            file, status = normalized, _stat(root / normalized)
    except PermissionError as error:
        raise os_error(error, root / file) from error
    except OSError as error:
        raise AntherError(f"{where}: {name} can't be a picture's name ({error.strerror})") from None
    if status is None:
        similar = files.similar(file)
        fix = (
            f"write {shorten(os.path.relpath(root / similar, folder))}"
            if similar
            else "add the picture or remove the line"
        )
        raise AntherError(f"{where}: {name} doesn't exist; {fix}")
    if not (root / file).resolve().is_relative_to(root.resolve()):
        raise outside
    if not stat.S_ISREG(status.st_mode):
        raise AntherError(f"{where}: {name} is not a file; name a picture")
    return file


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_picture(folder: Path, name: str) -> bool:
    try:
        return name.lower().endswith(SUPPORTED) and (folder / name).is_file()
    except (OSError, ValueError):
        return False


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in JUNK


def _case_folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/")
