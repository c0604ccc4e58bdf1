"""`metadata.jsonl`: the caption of each picture below a folder."""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import AntherError, refused, shown

METADATA = "metadata.jsonl"
EXAMPLE = '{"file_name": "cat.jpg", "text": "my cat"}'
READ = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of supported pictures."""
OTHERS = (".avif", ".heic", ".heif", ".jxl")
"""Suffixes of unsupported pictures: a missing caption is reported for these too, so that none is skipped silently."""
JUNK = {"@eadir", "__macosx", "$recycle.bin", "lost+found", "thumbs.db", "system volume information"}
"""Files that operating systems create in folders of pictures, beside those whose names begin with a dot."""
LARGEST = 64 * 2**20  # bytes of a sheet
LONGEST = 20_000  # characters of a caption

OnError = Callable[[AntherError], None]
"""Callback for a mistake. If it returns, the picture counts as absent."""


def stop(error: AntherError) -> None:
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
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return found

    def alike(self, name: str) -> str | None:
        """Return the one file whose name differs only in Unicode normalization (macOS decomposes accents)."""
        same = self._by_form.get(unicodedata.normalize("NFC", name), [])
        return same[0] if len(same) == 1 else None

    def hint(self, name: str) -> str | None:
        """Return a file whose name differs only in letter case or in the path separator."""
        wanted = _folded(name)
        return next((file for file in self.names if _folded(file) == wanted), None)

    def _walk(self) -> Iterator[str]:
        def failed(error: OSError) -> None:
            if not (isinstance(error, PermissionError) and Path(error.filename) == self.root):
                raise error  # a root may be accessible but not listable: its sheet then names its files

        for folder, folders, files in os.walk(self.root, onerror=failed):
            folders[:] = sorted(name for name in folders if not _junk(name))
            place = Path(folder).relative_to(self.root)
            yield from ((place / name).as_posix() for name in files if not _junk(name))


def captions(files: PictureFiles, folders: Iterable[str], on_error: OnError = stop) -> dict[str, str | None]:
    """Read the caption of each picture, by its path relative to the root; None if a listed picture can't be used.

    Args:
        files: the folder's files.
        folders: subfolders of the root that may have a sheet of their own.
        tell: called with each mistake.
    """
    root = files.root
    places = [root / METADATA, *(root / folder / METADATA for folder in folders)]
    sheets = [sheet for sheet in places if sheet.is_file()]
    if not sheets:
        raise AntherError(f"{root / METADATA}: missing; write it with a line for each picture: {EXAMPLE}")
    found: dict[str, str | None] = {}
    real: dict[str, str] = {}  # real file -> the listed path that leads to it
    for sheet in sheets:
        try:
            for number, line in _lines(sheet):
                try:
                    file, caption = _captioned(files, sheet, number, line)
                    target = os.path.realpath(root / file)
                    if file in found or target in real:
                        same = "" if file in found else f", for it is the same file as {shown(real[target])}"
                        raise AntherError(
                            f"{sheet}:{number}: {shown(file)} is listed twice{same}; remove one of the lines"
                        )
                    found[file], real[target] = caption, file
                except AntherError as error:
                    on_error(error)
                    if (named := _named(root, sheet, line)) is not None:
                        found.setdefault(named, None)
        except AntherError as error:  # of the whole sheet
            on_error(error)
    try:
        _check_all_captioned(files, found, real)
    except AntherError as error:
        on_error(error)
    return found


def _named(root: Path, sheet: Path, line: str) -> str | None:
    """Return the path relative to the root that a line names, whether or not the picture exists."""
    try:
        return Path(os.path.relpath(sheet.parent / json.loads(line)["file_name"], root)).as_posix()
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _check_all_captioned(files: PictureFiles, found: Mapping[str, str | None], real: Mapping[str, str]) -> None:
    root, pictures = files.root.resolve(), (name for name in files.names if name.lower().endswith((*READ, *OTHERS)))
    without = [name for name in pictures if name not in found and str(root / name) not in real]
    if not without:
        return
    more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
    line = f"has no caption{more}; add a line for it to {METADATA}, or move it elsewhere"
    if without[0].lower().endswith(OTHERS):
        line = f"has no caption{more}, and can't be read: save it as JPEG and add a line for that, or move it elsewhere"
    raise AntherError(f"{files.root / shown(without[0])}: {line}")


def _lines(sheet: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that isn't blank."""
    if sheet.stat().st_size > LARGEST:
        raise AntherError(f"{sheet}: over {LARGEST // 2**20} MiB: not a sheet of captions; split the folder")
    data = sheet.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise AntherError(f"{sheet}: is UTF-16 or UTF-32 text; save it as UTF-8")
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise AntherError(
                    f"{sheet}:{number}: byte {error.start + 1} isn't UTF-8 text; save the sheet as UTF-8"
                ) from None


def _captioned(files: PictureFiles, sheet: Path, number: int, line: str) -> tuple[str, str]:
    """Parse one line into the picture's path relative to the root and its caption."""
    where = f"{sheet}:{number}"
    try:
        entry: Any = json.loads(line)
        file_name, caption = entry["file_name"], entry.get("text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AntherError(f"{where}: must be a JSON object like {EXAMPLE}") from None
    if not isinstance(file_name, str) or not file_name:
        raise AntherError(f"{where}: file_name must be the name of a picture")
    name = shown(file_name)
    if not isinstance(caption, str) or not caption.strip():
        raise AntherError(f'{where}: {name} has no caption; write one as "text"')
    try:
        return _located(files, sheet.parent, file_name, where), _clean(caption, f"{where}: the caption of {name}")
    except AntherError as error:
        if _is_picture(sheet.parent, caption):
            raise AntherError(f"{where}: file_name and text are swapped: write {EXAMPLE}") from error
        raise


def _clean(caption: str, what: str) -> str:
    """Strip a caption and normalize its Unicode."""
    if len(caption) > LONGEST:
        raise AntherError(f"{what} has {len(caption):,} characters; shorten it to {LONGEST:,}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise AntherError(f"{what} holds half a character (a lone surrogate); write it anew") from None
    return unicodedata.normalize("NFC", caption.strip())


def _located(files: PictureFiles, beside: Path, file_name: str, where: str) -> str:
    """Resolve a file name in a sheet to the picture's path relative to the root."""
    name, root = shown(file_name), files.root
    try:
        os.fsencode(file_name.encode().decode())
    except UnicodeEncodeError:
        raise AntherError(f"{where}: file_name {name} holds half a character; write the picture's own name") from None
    if "\0" in file_name:
        raise AntherError(f"{where}: file_name {name} holds a NUL; write the picture's own name")
    listed = os.path.normpath(os.path.relpath(beside / file_name, root))
    outside = AntherError(f"{where}: {name} lies outside {root}; copy the picture into the folder")
    if listed.startswith(".."):  # named by its full path, through a link or not
        listed = os.path.relpath(os.path.realpath(beside / file_name), root.resolve())
    if listed == ".." or listed.startswith("../"):
        raise outside
    file = Path(listed).as_posix()
    try:
        found = _stat(root / file)
        if found is None and (alike := files.alike(file)) is not None:
            file, found = alike, _stat(root / alike)
    except PermissionError as error:
        raise refused(error, root / file) from error
    except OSError as error:
        raise AntherError(f"{where}: {name} can't be a picture's name ({error.strerror})") from None
    if found is None:
        hint = files.hint(file)
        mend = f"write {shown(os.path.relpath(root / hint, beside))}" if hint else "add the picture or remove the line"
        raise AntherError(f"{where}: {name} is not there; {mend}")
    if not (root / file).resolve().is_relative_to(root.resolve()):
        raise outside
    if not stat.S_ISREG(found.st_mode):
        raise AntherError(f"{where}: {name} is not a file; name a picture")
    return file


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_picture(folder: Path, name: str) -> bool:
    try:
        return name.lower().endswith(READ) and (folder / name).is_file()
    except (OSError, ValueError):
        return False


def _junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in JUNK


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/")
