"""People of a Parquet file with roles and donors: selections, folds, and files of some of them."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from common import atomic_files
from common.errors import AntherError
from common.seeding import derive_seed
from typefaces.picture_table import PERSON, ROLE, read_rows

EXTRA = "extra"  # members of federations who are never measured
DEVELOPMENT, TEST = "development", "test"
HELD_OUT = {"validation": 5, "test": 15}
"""Letters of each person that are not trained on."""


class HandwritingPerson(NamedTuple):
    """One person of the file."""

    name: str
    role: str
    donor: str
    """Institution that collected the handwriting; without a column `donor`, the name up to its last dash."""
    letters: int
    """Number of different letters."""


def read_people(file: Path) -> list[HandwritingPerson]:
    """List the people of a file, in an order by a hash of their names.

    Raises:
        AntherError: the file can't be read, or has no column `role`.
    """
    captions: dict[str, set[str]] = {}
    roles: dict[str, str] = {}
    for row in read_rows(file, required=[ROLE]):
        captions.setdefault(row.person, set()).add(row.text or "")
        roles[row.person] = row.role or ""
    donors = _donors(file)
    people = [
        HandwritingPerson(name, roles[name], donors.get(name, name.rpartition("-")[0]), len(captions[name]))
        for name in captions
    ]
    return sorted(people, key=lambda person: derive_seed("people", "order", person.name))


def select(people: Sequence[HandwritingPerson], role: str, letters: int = 0) -> list[HandwritingPerson]:
    """Select the people of a role who have this number of training letters beside the held-out ones.

    Args:
        people: all people.
        role: their role.
        letters: number of training letters.

    Raises:
        AntherError: there are none.
    """
    needed = letters + sum(HELD_OUT.values())
    selected = [person for person in people if person.role == role and person.letters >= needed]
    if not selected:
        known = ", ".join(sorted({person.role for person in people}))
        raise AntherError(f"--role {role}: no person of this role has {needed} letters; roles are {known}")
    return selected


def folds(people: Sequence[HandwritingPerson], count: int) -> list[list[str]]:
    """Divide people into folds, whose sizes differ by at most one; return their names."""
    return [[person.name for person in people[number::count]] for number in range(count)]


def by_donor(people: Sequence[HandwritingPerson], fewest: int) -> dict[str, list[str]]:
    """Group names by donor, without donors of fewer people."""
    groups: dict[str, list[str]] = {}
    for person in people:
        groups.setdefault(person.donor, []).append(person.name)
    return {donor: names for donor, names in sorted(groups.items()) if len(names) >= fewest}


def cohorts_of(panel: Sequence[str], others: Sequence[str], size: int) -> list[list[str]]:
    """Form federations of `size` people in which every member of a panel takes part once.

    A panel that is larger than a federation is divided; a smaller one is filled up with the first of the others, so
    that a smaller federation is part of a larger one.

    Args:
        panel: names of the people who are measured.
        others: names of people to fill up with.
        size: people in each federation.
    """
    if size < len(panel):
        parts = [list(panel[start : start + size]) for start in range(0, len(panel), size)]
        parts[-1] += [name for name in panel if name not in parts[-1]][: size - len(parts[-1])]
        return parts
    return [[*panel, *others[: size - len(panel)]]]


def write_subset(file: Path, names: Collection[str], out: Path) -> Path:
    """Write the rows of some people to another file, unless that exists.

    Args:
        file: the Parquet file.
        names: names of the people.
        out: path of the new file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not out.exists():
        table = pq.read_table(file)
        wanted = set(names)
        keep = pa.array([name in wanted for name in table.column(PERSON).to_pylist()])
        out.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pq.write_table(table.filter(keep), buffer)
        atomic_files.write(out, buffer.getvalue())
    return out


def _donors(file: Path) -> dict[str, str]:
    """Return the donor of each person; empty if the file has no such column."""
    import pyarrow.parquet as pq

    if "donor" not in pq.read_schema(file).names:
        return {}
    table = pq.read_table(file, columns=[PERSON, "donor"])
    return dict(zip(table.column(PERSON).to_pylist(), table.column("donor").to_pylist(), strict=True))
