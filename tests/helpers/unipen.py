"""Files in the UNIPEN format, written by hand: characters of known size and place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from typefaces.dataset import GLYPHS

POINTS_PER_MM = 20
DRAWN = 41
"""Points of each written character."""


@dataclass(frozen=True)
class Box:
    """Ink of a character in mm: one stroke along the diagonals and upright sides of this rectangle."""

    left: float
    bottom: float
    width: float
    height: float

    def points(self) -> list[tuple[float, float]]:
        """Return positions in mm: from the lower left corner by the corners, in four equal parts."""
        corners = [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
        parts = (DRAWN - 1) // 4
        path = [corners[0]]
        for (x0, y0), (x1, y1) in pairwise(corners):
            path += [(x0 + (x1 - x0) * i / parts, y0 + (y1 - y0) * i / parts) for i in range(1, parts + 1)]
        return [(self.left + x * self.width, self.bottom + y * self.height) for x, y in path]


def form(glyph: str, cap: float = 5.0) -> tuple[float, float, float]:
    """Return width, height and bottom over the baseline of a glyph, for a cap height in mm."""
    if glyph in "gjpqy":
        return 0.5 * cap, 0.9 * cap, -0.3 * cap
    if glyph in "acemnorsuvwxz":
        return 0.5 * cap, 0.6 * cap, 0.0
    return 0.6 * cap, cap, 0.0


def line(glyphs: str, *, cap: float = 5.0, baseline: float = 0.0) -> list[tuple[str, Box]]:
    """Write characters beside each other on a line."""
    result = []
    for index, glyph in enumerate(glyphs):
        width, height, bottom = form(glyph, cap)
        result.append((glyph, Box(1.5 * cap * index, baseline + bottom, width, height)))
    return result


def ink(boxes: Iterable[Box]) -> str:
    """Return one pen-down component for each box."""
    parts = []
    for box in boxes:
        points = (f"{x * POINTS_PER_MM:.0f} {y * POINTS_PER_MM:.0f}" for x, y in box.points())
        parts.append(".PEN_DOWN\n" + "\n".join(points) + "\n.PEN_UP\n.DT 40\n")
    return "".join(parts)


def add_page(
    root: Path, donor: str, name: str, characters: Iterable[tuple[str, Box]], header: Mapping[str, str] | None = None
) -> None:
    """Add a person's page to a distribution: a file of ink, and files of digits, capital and lowercase letters.

    Args:
        root: the distribution.
        donor: folder of the page.
        name: name of its files, and of the person unless the header has .WRITER_ID.
        characters: labels and their ink.
        header: further keywords.
    """
    written = list(characters)
    keywords = {"COORD": "X Y", "WRITER_ID": name, "X_POINTS_PER_MM": str(POINTS_PER_MM)} | dict(header or {})
    lines = "".join(f".{key} {value}\n" for key, value in keywords.items())
    put(root / "include" / donor / f"{name}.dat", lines + ink(box for _, box in written))
    for folder, glyphs in (("1a", GLYPHS[:10]), ("1b", GLYPHS[10:36]), ("1c", GLYPHS[36:])):
        segments = [
            f'.SEGMENT CHARACTER {number} OK "{glyph}"\n'
            for number, (glyph, _) in enumerate(written)
            if glyph in glyphs
        ]
        if segments:
            put(root / "data" / folder / donor / f"{name}.dat", f".INCLUDE {donor}/{name}.dat\n" + "".join(segments))


def put(path: Path, text: str) -> Path:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
    return path
