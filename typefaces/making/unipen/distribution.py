"""Find the letters and digits of the distribution: which files hold them, who wrote them, and in which units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import AntherError, describe_error
from typefaces.dataset import GLYPHS
from typefaces.making.unipen.format import PenFile, delineate, read
from typefaces.making.unipen.strokes import WrittenGlyph

ISOLATED = ("1a", "1b", "1c")
"""Folders of isolated digits, capital letters and lowercase letters."""
WORDS = ("7/hpp", "7/sta", "7/hpb")
"""Folders of isolated words in which writers also wrote single characters."""
LEVELS = ("CHARACTER", "WORD")
POINTS_PER_MM = 10.0
"""Resolution of files that don't state theirs. It cancels out, because each person has a scale of their own."""
MM_PER_INCH = 25.4


@dataclass
class Extract:
    """Characters of the distribution, and the parts that were left out."""

    glyphs: list[WrittenGlyph] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of segments by reason."""
    damaged: list[str] = field(default_factory=list)
    """Message about each file that was skipped."""


def extract(folder: Path) -> Extract:
    """Read all letters and digits.

    Args:
        folder: the distribution, with the folders `data` and `include`.

    Raises:
        AntherError: the folder isn't the distribution.
    """
    include = folder / "include"
    if not ((folder / "data").is_dir() and include.is_dir()):
        raise AntherError(f"{folder}: has no folders data and include: name the unpacked folder of train_r01_v07")
    result = Extract()
    for donor, path in annotation_files(folder / "data"):
        try:
            file = read(path, include)
        except (AntherError, OSError) as error:
            result.damaged.append(describe_error(error))
            continue
        collect(file, donor, result)
    return result


def annotation_files(data: Path) -> Iterator[tuple[str, Path]]:
    """Yield donor and path of each file of segments, in a fixed order."""
    for name in (*ISOLATED, *WORDS):
        for path in sorted((data / name).rglob("*.dat")):
            yield path.relative_to(data).parts[1], path


def collect(file: PenFile, donor: str, result: Extract) -> None:
    """Add the characters of a file to the result, in mm.

    Args:
        file: the file.
        donor: institution that collected it.
        result: receives characters, and reasons for segments that are left out.
    """
    person, units = writer(donor, file), points_per_mm(file.header)
    if file.malformed:
        result.left_out["a statement that can't be read"] += file.malformed
    for segment in file.segments:
        if segment.level not in LEVELS or len(segment.label) != 1 or segment.label not in GLYPHS:
            continue
        try:
            strokes, position = delineate(file.components, segment.delineation)
        except ValueError as reason:
            result.left_out[str(reason)] += 1
            continue
        if not strokes or not np.ptp(np.concatenate(strokes), axis=0).any():
            result.left_out["no ink"] += 1
            continue
        result.glyphs.append(
            WrittenGlyph(
                person=person,
                glyph=segment.label,
                strokes=tuple(stroke / units for stroke in strokes),
                page=file.ink,
                position=position,
                bad=segment.quality == "BAD",
            )
        )


def writer(donor: str, file: PenFile) -> str:
    """Return a person's key, `donor/name`. It contains a name: only its hash and its donor may leave this program."""
    words = file.header.get("WRITER_ID", "").split()
    name = words[0] if words else "?"
    if donor == "imp" and file.other_names:  # two people have the same identifier here
        name += f".{file.other_names.split()[0].lower()}"
    if donor == "ceb" and name == "gb2911":  # the same person gave to both
        donor = "cea"
    if name.startswith("text") and name.endswith("Split"):  # one identifier per text that a person wrote
        name = name.removeprefix("text").removesuffix("Split")
    return f"{donor}/{name}"


def points_per_mm(header: dict[str, str]) -> Sequence[float]:
    """Return the resolution in x and y."""
    x = _resolution(header, "X") or POINTS_PER_MM
    return x, _resolution(header, "Y") or x


def _resolution(header: dict[str, str], axis: str) -> float | None:
    """Return points per mm; None if the header doesn't state a positive number."""
    for unit, mm in (("MM", 1.0), ("INCH", MM_PER_INCH)):
        try:
            points = float(header[f"{axis}_POINTS_PER_{unit}"].split()[0]) / mm
        except (KeyError, ValueError, IndexError):
            continue
        if 0 < points < float("inf"):
            return points
    return None
