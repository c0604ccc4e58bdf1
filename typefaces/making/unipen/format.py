"""Read a file in the UNIPEN 1.0 format: pen traces, and segments that label parts of them.

A statement is a line that starts with a dot and a keyword, with its argument, which continues until the next such line.
A *component* is one .PEN_DOWN or .PEN_UP; segments name components by number.

References:
    Guyon et al., "UNIPEN project of on-line data exchange and recognizer benchmarks", ICPR 1994.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import AntherError, shorten

Points = NDArray[np.float64]
"""Pen positions [n, 2]: x, y; y points up."""

DOCUMENTATION = {".lex", ".doc"}
"""Included files of words and explanations. They hold no ink, and may be absent."""
STATEMENT = re.compile(r"^\.(?=[A-Z])", re.MULTILINE)
SEGMENT = re.compile(r'(\S+)\s+(\S+)\s+(\S+)\s+"(.*)"', re.DOTALL)
RANGE = re.compile(r"(\d+)(?::(\d+))?(?:-(\d+)(?::(\d+))?)?")


class PenComponent(NamedTuple):
    """Movement of the pen between two events."""

    down: bool
    """Whether the pen touches the paper."""
    points: Points | None
    """Positions in the device's units; None if they can't be read."""


class PenSegment(NamedTuple):
    """Label of a part of the ink."""

    level: str
    """For example CHARACTER or WORD."""
    delineation: str
    quality: str
    """BAD, OK, GOOD or ?."""
    label: str


@dataclass
class PenFile:
    """Content of a file and of the files that it includes."""

    header: dict[str, str] = field(default_factory=dict)
    """Last argument of each keyword other than ink and segments."""
    other_names: str = ""
    """Argument of "Other Names:" in a comment."""
    components: list[PenComponent] = field(default_factory=list)
    segments: list[PenSegment] = field(default_factory=list)
    malformed: int = 0
    """Number of segments that can't be read."""
    ink: tuple[Path, ...] = ()
    """Files that hold components, in order."""


def read(path: Path, include: Path) -> PenFile:
    """Read a file with its includes.

    Args:
        path: the file.
        include: folder of included files.

    Raises:
        AntherError: a file can't be read, includes a file that is absent, or declares no X and Y.
        OSError: a file can't be read.
    """
    result, columns = PenFile(), ["X", "Y"]
    for file, keyword, argument in statements(path, include):
        if keyword == "COORD":
            columns = argument.split()
            if not {"X", "Y"} <= set(columns):
                raise AntherError(f"{file}: .COORD {shorten(argument)} has no X and Y: restore the file")
        elif keyword in ("PEN_DOWN", "PEN_UP"):
            points = coordinates(argument, columns)
            # An empty .PEN_UP has no number. An empty .PEN_DOWN has one in the distribution's files, against the
            # definition of the format.
            if keyword == "PEN_DOWN" or points is None or len(points):
                result.components.append(PenComponent(keyword == "PEN_DOWN", points))
                result.ink += () if file in result.ink else (file,)
        elif keyword == "SEGMENT":
            if match := SEGMENT.fullmatch(argument):
                result.segments.append(PenSegment(*match.groups()))
            else:
                result.malformed += 1
        else:
            result.header[keyword] = argument
            if names := re.search(r"Other Names:[ \t]*(.*)", argument):
                result.other_names = names[1].strip()
    return result


def statements(path: Path, include: Path, parents: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str, str]]:
    """Yield file, keyword and argument of each statement, with those of included files in place of .INCLUDE.

    Args:
        path: the file.
        include: folder of included files; names may also be relative to its parent.
        parents: files that are being read, the outermost first.

    Raises:
        AntherError: an included file is absent, or includes itself.
        OSError: a file can't be read.
    """
    # Latin-1 decodes any bytes; labels and numbers are ASCII. Lines end as on Unix, DOS or Macintosh.
    text = path.read_bytes().decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")
    for statement in STATEMENT.split(text)[1:]:  # text before the first keyword is a comment
        keyword, *rest = statement.split(maxsplit=1)
        argument = rest[0].rstrip() if rest else ""
        if keyword != "INCLUDE":
            yield path, keyword, argument
            continue
        found = next((file for file in (include / argument, include.parent / argument) if file.is_file()), None)
        if found in (path, *parents):
            raise AntherError(f"{path}: includes {shorten(argument)}, which includes it: restore the file")
        if found is not None and found.suffix != ".lex":
            yield from statements(found, include, (path, *parents))
        elif found is None and Path(argument).suffix not in DOCUMENTATION:
            raise AntherError(f"{path}: includes {shorten(argument)}, which is absent: unpack it into {include}")


def coordinates(argument: str, columns: list[str]) -> Points | None:
    """Read the positions of a component.

    Args:
        argument: one number per column for each point; columns other than X and Y may hold anything.
        columns: argument of .COORD.

    Returns:
        Positions [n, 2], without an incomplete last point; None if an earlier point is incomplete, or a position isn't
        a finite number.
    """
    tokens, width = argument.split(), len(columns)
    if len(tokens) % width and any(len(line.split()) % width for line in argument.splitlines()[:-1]):
        return None
    count = len(tokens) // width
    try:
        numbers = [
            np.array(tokens[columns.index(axis) : count * width : width], dtype=np.float64) for axis in ("X", "Y")
        ]
    except ValueError:
        return None
    points = np.stack(numbers, axis=1)
    return points if np.isfinite(points).all() else None


def delineate(components: list[PenComponent], delineation: str) -> tuple[list[Points], int]:
    """Return the ink of a segment.

    Args:
        components: components of the file.
        delineation: ranges of components, first and last included, such as `3`, `12-14` or `7:3-8:20,11`, where the
            number after a colon is a point of the component.

    Returns:
        Positions [n, 2] of each stroke, and the number of the first component with ink, -1 if there is no ink.

    Raises:
        ValueError: the reason, if the delineation can't be read, or refers to ink that is absent or damaged.
    """
    strokes, position = [], -1
    for part in delineation.split(","):
        if not (match := RANGE.fullmatch(part)):
            raise ValueError("a delineation that can't be read")
        first, start, last, end = (None if number is None else int(number) for number in match.groups())
        assert first is not None
        if last is None:
            last, end = first, start  # a single point, or all of one component
        if last >= len(components):
            raise ValueError("ink that is absent")
        for number in range(first, last + 1):
            down, points = components[number]
            if not down:
                continue
            if points is None:
                raise ValueError("ink that can't be read")
            low = start if start is not None and number == first else 0
            high = end + 1 if end is not None and number == last else len(points)
            if len(stroke := points[low:high]):
                strokes.append(stroke)
                position = number if position < 0 else position
    return strokes, position
