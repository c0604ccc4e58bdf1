"""Draw a contact sheet: a thumbnail of each picture with the frame of its crop, its name and its caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.data.inspection import FileVerdict, Size
from common.errors import AntherError, one_line, os_error, shorten

COLUMNS, THUMBNAIL, GAP, LINE = 5, 224, 12, 14  # pixels, except the columns
_TEXT_LINES, _LETTERS = 4, 38  # of a cell
MAX_CELLS = 500
_FRAME, _DIM = "#d02020", 96  # opacity of the veil over the part that is cut off
Box = tuple[float, float, float, float]


def square_crop(size: Size) -> Box:
    """Return the centered square (left, upper, right, lower) that a picture is cropped to, in its pixels."""
    width, height = size
    side = min(size)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def write_contact_sheet(path: Path, folder: Path, files: Sequence[FileVerdict]) -> None:
    """Write the sheet of the files that are used.

    Args:
        path: PNG file, outside of the folder.
        folder: folder of the pictures.
        files: files as inspected; those without a picture are left out.

    Raises:
        AntherError: there are no pictures or too many, or the file can't be written.
    """
    from PIL import Image, ImageDraw  # slow import, so only here

    shown = [file for file in files if file.picture is not None]
    if path.resolve().is_relative_to(folder.resolve()):
        raise AntherError(f"{path}: lies in the folder of pictures, so it would become one; write it elsewhere")
    if not shown:
        raise AntherError(f"{path}: there is no picture to show")
    if len(shown) > MAX_CELLS:
        raise AntherError(f"{path}: shows at most {MAX_CELLS} pictures, not {len(shown)}; inspect a part of the folder")
    cell_width, cell_height = THUMBNAIL + GAP, THUMBNAIL + _TEXT_LINES * LINE + GAP
    columns = min(COLUMNS, len(shown))
    size = (columns * cell_width + GAP, -(-len(shown) // columns) * cell_height + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, file in enumerate(shown):
        x, y = GAP + index % columns * cell_width, GAP + index // columns * cell_height
        sheet.paste(_thumbnail(file), (x, y))
        text = _wrapped(f"{file.file} ({file.split})", " | ".join(file.captions))
        draw.multiline_text((x, y + THUMBNAIL + 2), text, fill="black", spacing=1)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise os_error(error, path) from error


def _thumbnail(file: FileVerdict) -> Any:
    """Return a square with the whole picture, dimmed outside of its crop."""
    from PIL import Image, ImageDraw

    assert file.picture
    assert file.size
    image = Image.fromarray(file.picture.at_least(THUMBNAIL // 2)).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    scale = image.width / file.size[0], image.height / file.size[1]
    left, upper, right, lower = (edge * scale[axis % 2] for axis, edge in enumerate(square_crop(file.size)))
    veil = Image.new("L", image.size, 255 - _DIM)
    veil.paste(255, (round(left), round(upper), round(right), round(lower)))
    framed = Image.composite(image, Image.new("RGB", image.size, "white"), veil)
    ImageDraw.Draw(framed).rectangle((left, upper, right - 1, lower - 1), outline=_FRAME, width=2)
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#e8e8e8")
    square.paste(framed, ((THUMBNAIL - image.width) // 2, (THUMBNAIL - image.height) // 2))
    return square


def _wrapped(name: str, caption: str) -> str:
    lines = textwrap.wrap(one_line(caption), _LETTERS, max_lines=_TEXT_LINES - 1, placeholder=" …")
    return "\n".join([shorten(name, _LETTERS), *lines])
