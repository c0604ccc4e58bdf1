"""Manual decisions, `families.csv`: fonts with role, design and license.

`excluded.csv` lists the fonts that were examined and left out, with the reason; no code reads it.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from typefaces.dataset import ROLES

FILE = Path(__file__).parent / "families.csv"
KINDS = ("text", "hand", "individual")
DESIGNER_SHARE = 1 / 5  # largest fraction of writers by one designer


class CatalogEntry(NamedTuple):
    """Row of the table."""

    name: str
    role: str
    kind: str
    designer: str
    package: str
    licence: str
    design: str
    font: str  # path inside the package
    face: int  # index in a collection; otherwise 0


def read(path: Path = FILE) -> list[CatalogEntry]:
    """Read the table, sorted by name; ValueError if a design has two roles or a designer too many writers."""
    with path.open(newline="", encoding="utf-8") as file:
        entries = [CatalogEntry(face=int(row.pop("face")), **row) for row in csv.DictReader(file)]
    check(entries)
    return sorted(entries)


def check(entries: Sequence[CatalogEntry]) -> None:
    for entry in entries:
        if entry.role not in ROLES or entry.kind not in KINDS or not all((entry.name, entry.designer, entry.licence)):
            raise ValueError(f"incomplete or unknown values: {entry}")
        if (entry.role == "public") != (entry.kind == "text"):
            raise ValueError(f"{entry.name}: public families are of kind text, writers are not")
    if duplicates := [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]:
        raise ValueError(f"duplicate names: {duplicates}")
    roles = defaultdict(list)
    for entry in entries:
        roles[entry.design].append(entry.role)
    if leaks := [
        design for design, seen in roles.items() if len(set(seen)) > 1 or (len(seen) > 1 and "public" not in seen)
    ]:
        raise ValueError(f"designs in two roles, or twice among writers: {leaks}")
    writers = [entry for entry in entries if entry.role != "public"]
    designer, count = Counter(entry.designer for entry in writers).most_common(1)[0]
    if count > DESIGNER_SHARE * len(writers):
        raise ValueError(f"{designer} made {count} of {len(writers)} writers, over {DESIGNER_SHARE:.0%}")
