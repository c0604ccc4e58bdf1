"""Read metadata files, which list the pictures of a folder with their captions: `metadata.jsonl` or `metadata.csv`.

They follow the imagefolder convention of Hugging Face's `datasets`: a file lies in the folder of its pictures or in one
above it, and has `file_name` and `text` for each. In `metadata.jsonl`, `text` may be a list of several captions.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from client.data.caption_text import Captions, clean_captions, read_lines, read_text
from client.data.picture_files import SUPPORTED, OnError, PictureFiles
from common.errors import AntherError, os_error, shorten

METADATA = "metadata.jsonl"
METADATA_CSV = "metadata.csv"
EXAMPLE = '{"file_name": "cat.jpg", "text": "my cat"}'
_CSV_EXAMPLE = "file_name,text"
Listed = dict[str, str]
"""Listed path of each real file that it leads to."""


def find_sheets(files: PictureFiles, folders: Iterable[str]) -> list[Path]:
    """Find the metadata files: of the root, of the folders that split the pictures, and of all others.

    Raises:
        AntherError: a folder has one of each kind.
    """
    root = files.root
    first = [root, *(root / folder for folder in folders)]
    others = sorted({(root / name).parent for name in files.names if Path(name).name in (METADATA, METADATA_CSV)})
    sheets = []
    for folder in dict.fromkeys([*first, *others]):
        found = [folder / name for name in (METADATA, METADATA_CSV) if (folder / name).is_file()]
        if len(found) > 1:
            raise AntherError(f"{folder}: has both {METADATA} and {METADATA_CSV}; remove one of them")
        sheets += found
    return sheets


def read_sheets(
    files: PictureFiles, sheets: Iterable[Path], on_error: OnError
) -> tuple[dict[str, Captions | None], Listed]:
    """Read metadata files.

    Args:
        files: the folder's files.
        sheets: metadata files, as by `find_sheets`.
        on_error: called with each mistake.

    Returns:
        The captions of each picture, by its path relative to the root, or None if it can't be used; and the listed
        paths by real file.
    """
    root = files.root
    caption_of: dict[str, Captions | None] = {}
    listed_as: Listed = {}
    for sheet in sheets:
        try:
            for number, line in _entries(sheet):
                try:
                    file, captions = _parse_entry(files, sheet, number, line)
                    target = os.path.realpath(root / file)
                    if file in caption_of or target in listed_as:
                        same = "" if file in caption_of else f" (the same file as {shorten(listed_as[target])}"
                        raise AntherError(
                            f"{sheet}:{number}: {shorten(file)} is listed twice{same}; remove one of the lines"
                        )
                    caption_of[file], listed_as[target] = captions, file
                except AntherError as error:
                    on_error(error)
                    if (listed := _listed_path(root, sheet, line)) is not None:
                        caption_of.setdefault(listed, None)
        except AntherError as error:  # the file can't be used at all
            on_error(error)
    return caption_of, listed_as


def _entries(sheet: Path) -> Iterator[tuple[int, str | dict[Any, Any]]]:
    """Yield number and content of each line: its text, or the row of a CSV file."""
    if sheet.name == METADATA:
        yield from read_lines(sheet)
        return
    rows = csv.DictReader(io.StringIO(read_text(sheet), newline=""), strict=True)
    try:
        columns = rows.fieldnames or []
        if not {"file_name", "text"} <= set(columns):
            fix = "separate them by commas" if any(";" in name or "\t" in name for name in columns) else "name them so"
            raise AntherError(f"{sheet}:1: must have columns {_CSV_EXAMPLE}; {fix}")
        for row in rows:
            if None in row:
                raise AntherError(f"{sheet}:{rows.line_num}: has too many columns; put the caption in double quotes")
            yield rows.line_num, row
    except csv.Error as error:
        raise AntherError(f"{sheet}:{rows.line_num}: can't be read ({error}); put captions in double quotes") from None


def _listed_path(root: Path, sheet: Path, line: str | dict[Any, Any]) -> str | None:
    """Return the path relative to the root that a line names, whether or not the picture exists."""
    try:
        entry = json.loads(line) if isinstance(line, str) else line
        return Path(os.path.relpath(sheet.parent / entry["file_name"], root)).as_posix()
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _parse_entry(files: PictureFiles, sheet: Path, number: int, line: str | dict[Any, Any]) -> tuple[str, Captions]:
    """Parse one line: the picture's path relative to the root, and its captions.

    Args:
        files: the folder's files.
        sheet: the metadata file.
        number: line number, for messages.
        line: the line's text, or the row of a CSV file.
    """
    where = f"{sheet}:{number}"
    try:
        entry: Any = json.loads(line) if isinstance(line, str) else line
        file_name, text = entry["file_name"], entry.get("text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AntherError(f"{where}: must be a JSON object like {EXAMPLE}") from None
    if not isinstance(file_name, str) or not file_name:
        raise AntherError(f"{where}: file_name must be the name of a picture")
    name = shorten(file_name)
    captions = text if isinstance(text, list) else [text]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise AntherError(f'{where}: {name} has no caption; write one as "text"')
    try:
        return _resolve(files, sheet.parent, file_name, where), clean_captions(
            captions, f"{where}: the caption of {name}"
        )
    except AntherError as error:
        if _is_picture(sheet.parent, captions[0]):
            raise AntherError(f"{where}: file_name and text are swapped: write {EXAMPLE}") from error
        raise


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
