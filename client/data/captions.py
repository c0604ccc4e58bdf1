"""Captions of the pictures in a folder: from metadata files, from text files beside pictures, or one for all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from client.data.caption_text import PLACE, Captions, clean_caption, fill_template, read_captions_beside
from client.data.metadata import EXAMPLE, METADATA, Listed, find_sheets, read_sheets
from client.data.picture_files import UNSUPPORTED, OnError, PictureFiles, raise_error
from common.errors import AntherError, shorten


def read_captions(
    files: PictureFiles, folders: Iterable[str], on_error: OnError = raise_error, *, template: str | None = None
) -> dict[str, Captions | None]:
    """Read the captions of each picture, by its path relative to the root.

    A picture's captions are those that a metadata file lists, else the lines of the text file beside it: `cat.txt` for
    `cat.jpg`. The template replaces them, or surrounds them if it contains `{text}`.

    Args:
        files: the folder's files.
        folders: sub-folders of the root that split the pictures.
        on_error: called with each mistake.
        template: one caption for all pictures, or a text around each picture's captions; None: their own.

    Returns:
        Captions by path; None for a picture that is listed or has a text file but can't be used.
    """
    if template is not None:
        template = clean_caption(template, "the caption for all pictures")
    for_all = template if template is not None and PLACE not in template else None
    sheets = find_sheets(files, folders)
    beside = text_files(files)
    if not sheets and not beside and for_all is None:
        raise AntherError(
            f"{files.root / METADATA}: missing; write it with a line for each picture: {EXAMPLE}, or write NAME.txt "
            'beside each picture, or one caption for all: caption="a photo of …"'
        )
    caption_of, listed_as = read_sheets(files, sheets, on_error)
    for file in files.pictures:
        target = os.path.realpath(files.root / file)
        if file in caption_of or target in listed_as or (file not in beside and for_all is None):
            continue
        try:
            _check_inside(files, file)
            caption_of[file] = read_captions_beside(files.root / beside[file]) if for_all is None else (for_all,)
            listed_as[target] = file
        except AntherError as error:
            on_error(error)
            caption_of[file] = None
    try:
        _check_all_captioned(files, caption_of, listed_as)
    except AntherError as error:
        on_error(error)
    if template is None:
        return caption_of
    return {file: captions and fill_template(template, captions) for file, captions in caption_of.items()}


def text_files(files: PictureFiles) -> dict[str, str]:
    """Return the text file beside each picture that has one."""
    texts = {name for name in files.names if name.endswith(".txt")}
    named = {file: PurePosixPath(file).with_suffix(".txt").as_posix() for file in files.pictures}
    return {file: text for file, text in named.items() if text in texts}


def _check_inside(files: PictureFiles, file: str) -> None:
    path = files.root / file
    if not path.resolve().is_relative_to(files.root.resolve()):
        raise AntherError(f"{path}: lies outside {files.root}; copy the picture into the folder")
    if not path.is_file():
        raise AntherError(f"{path}: is not a file; remove it, or replace it by the picture")


def _check_all_captioned(files: PictureFiles, caption_of: Mapping[str, object], listed_as: Listed) -> None:
    real = {name: os.path.realpath(files.root / name) for name in files.pictures if name not in caption_of}
    without = [name for name, path in real.items() if path not in listed_as]
    if not without:
        return
    more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
    line = f"has no caption{more}; add a line for it to {METADATA}, or move it elsewhere"
    if without[0].lower().endswith(UNSUPPORTED):
        line = f"has no caption{more}, and can't be read: save it as JPEG and add a line for that, or move it elsewhere"
    raise AntherError(f"{files.root / shorten(without[0])}: {line}")
