"""Text of captions: files are read as UTF-8, and captions are cleaned and limited in number and length."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import AntherError, os_error, shorten

Captions = tuple[str, ...]
"""Captions of one picture; at each visit, training draws one of them."""

PLACE = "{text}"
"""Place of a picture's own caption in a template."""
MAX_CAPTION = 20_000  # characters
MAX_CAPTIONS = 100  # of one picture
MAX_SHEET_BYTES = 64 * 2**20  # bytes of a file with captions


def clean_captions(captions: Sequence[str], what: str) -> Captions:
    """Clean the captions of one picture, without repetitions.

    Args:
        captions: captions that aren't blank.
        what: their origin, for error messages.
    """
    if len(captions) > MAX_CAPTIONS:
        raise AntherError(f"{what} are {len(captions)}; keep at most {MAX_CAPTIONS}")
    return tuple(dict.fromkeys(clean_caption(caption, what) for caption in captions))


def clean_caption(caption: str, what: str) -> str:
    """Strip a caption and normalize its Unicode."""
    if len(caption) > MAX_CAPTION:
        raise AntherError(f"{what} has {len(caption):,} characters; shorten it to {MAX_CAPTION:,}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise AntherError(f"{what} contains half a character (an unpaired surrogate); write it again") from None
    return unicodedata.normalize("NFC", caption.strip())


def fill_template(template: str, captions: Captions) -> Captions:
    """Put each caption into the template; without `{text}`, the template is the only caption."""
    if PLACE not in template:
        return (template,)
    return tuple(template.replace(PLACE, caption) for caption in captions)


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of a UTF-8 file that isn't blank.

    Raises:
        AntherError: as for `read_text`, when the line is reached.
    """
    for number, line in enumerate(_read_bytes(file).splitlines(), start=1):
        if line.strip():
            yield number, _decode(line, file, number)


def read_text(file: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        AntherError: the file is too large or in another encoding.
    """
    return "".join(
        _decode(line, file, number) for number, line in enumerate(_read_bytes(file).splitlines(keepends=True), start=1)
    )


def _read_bytes(file: Path) -> bytes:
    """Return the content of a file without the mark of UTF-8."""
    try:
        if file.stat().st_size > MAX_SHEET_BYTES:
            raise AntherError(f"{file}: over {MAX_SHEET_BYTES // 2**20} MiB, too large for captions; split the folder")
        data = file.read_bytes()
    except OSError as error:
        raise os_error(error, file) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise AntherError(f"{file}: is UTF-16 or UTF-32 text; save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def _decode(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AntherError(f"{file}:{number}: byte {error.start + 1} isn't UTF-8 text; save the file as UTF-8") from None


def read_captions_beside(file: Path) -> Captions:
    """Read the text file beside a picture: one caption per line.

    Raises:
        AntherError: the file has no caption, or can't be read as one.
    """
    captions = [line for _, line in read_lines(file)]
    if not captions:
        raise AntherError(f"{file}: is empty; write the picture's caption, or several in lines")
    return clean_captions(captions, f"{file}: the captions of {shorten(file.stem)}")
