"""People of a data set: a Parquet file, a folder of such files, or a folder with one picture folder for each person.

The pictures of a Parquet file stay in memory as they are stored, and are decoded when they are used. Those of folders
stay on disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from client.data import SPLITS, Pictures, StoredPicture, list_pictures
from client.data.metadata import METADATA
from client.data.picture_files import JUNK
from common.errors import AntherError, os_error, shorten
from common.seeding import derive_seed
from conf.schemas.training import DataConfig
from simulations.fleet.encoded_picture import EncodedPicture
from simulations.fleet.person_splits import Sizes, split_person
from simulations.fleet.writers import LETTERS, PICTURES, Writer, slug
from training.jobs import Picture
from typefaces.people import CLASSES
from typefaces.picture_table import PERSON, ROLE, PictureRow, StoredImage, read_images, read_rows

VERIFIED = 10_000
"""Number of pictures that are decoded at the start to find damaged ones; the others are decoded when they are used."""


class People(NamedTuple):
    """People who take part in the rounds, and people who join after the last one."""

    members: list[Writer]
    newcomers: list[Writer]


@dataclass(frozen=True, slots=True)
class PersonPicture:
    """One picture of a person, not opened yet."""

    caption: str
    split: str | None
    source: PictureRow | Path


@dataclass(frozen=True)
class Person:
    """One person of a data set."""

    name: str
    role: str | None
    list_pictures: Callable[[], Sequence[PersonPicture]]


def count_people(data: DataConfig) -> int:
    """Count the people who take part in the rounds; AntherError as for `load_people`."""
    members, _ = _choose(data, _read(data))
    return len(members)


def load_people(data: DataConfig) -> People:
    """Load the chosen people of `data.path`, in an order by a hash of their names.

    Raises:
        AntherError: a file, column, caption, split or picture can't be used, a person has too few pictures, a role or a
            name is unknown, or there are too few people.
    """
    chosen = _choose(data, _read(data))
    everyone = [*chosen[0], *chosen[1]]
    _check_names(everyone)
    listed = {person.name: person.list_pictures() for person in everyone}
    sizes = Sizes(data.train, data.validation, data.test)
    splits = {}
    too_few = []
    for person in everyone:
        try:
            splits[person.name] = split_person(person.name, listed[person.name], sizes)
        except AntherError as error:
            too_few.append(str(error))
    if too_few:
        more = f" (and {len(too_few) - 1} more people)" if len(too_few) > 1 else ""
        raise AntherError(f"{data.path}: {too_few[0]}{more}; lower it, or leave out people with few pictures")
    sources = [picture for split in splits.values() for part in split for picture in part]
    opened = dict(zip(map(id, sources), _open(sources, data.background), strict=True))

    def writer(person: Person) -> Writer:
        letters = all(picture.caption in CLASSES for picture in listed[person.name])
        pictures = Pictures(*(tuple(opened[id(picture)] for picture in part) for part in splits[person.name]))
        return Writer(slug(person.name), LETTERS if letters else PICTURES, pictures, role=person.role)

    return People(*([writer(person) for person in people] for people in chosen))


def _read(data: DataConfig) -> list[Person]:
    """List the people of the data set."""
    path = Path(data.path or "").expanduser()
    if not path.exists():
        raise AntherError(f"data.path={data.path}: no such file or folder")
    if not path.is_dir():
        return _in_files(data, [path])
    try:
        files = sorted(path.glob("*.parquet"))
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not _is_junk(folder.name))
    except OSError as error:
        raise os_error(error, path) from error
    if files:
        return _in_files(data, files)
    if not folders:
        hint = "is the folder of one person" if (path / METADATA).exists() else "has no people"
        raise AntherError(f"{path}: {hint}; data.path needs *.parquet, or a folder of pictures for each person")
    if data.person != PERSON:
        raise AntherError(f"data.person={data.person}: only used with Parquet files; in {path} a folder is a person")
    return [Person(folder.name, None, partial(_in_folder, folder)) for folder in folders]


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _in_files(data: DataConfig, files: Iterable[Path]) -> list[Person]:
    required = [ROLE] if data.roles or data.evaluated_roles else []
    rows_of: dict[str, list[PictureRow]] = {}
    for file in files:
        for row in read_rows(file, person=data.person, required=required):
            rows_of.setdefault(row.person, []).append(row)
    people = []
    for name, rows in rows_of.items():
        if odd := next((row for row in rows if row.role != rows[0].role), None):
            raise AntherError(f"{odd}: role={odd.role}, but {rows[0].role} in {rows[0]}; a person has one role")
        people.append(Person(name, rows[0].role, partial(_in_rows, rows)))
    return people


def _in_rows(rows: Sequence[PictureRow]) -> list[PersonPicture]:
    """Return the pictures of a person's rows, with checked captions and splits."""
    is_split = any(row.split is not None for row in rows)
    pictures = []
    for row in rows:
        caption = (row.text or "").strip()
        if not caption:
            raise AntherError(f"{row}: has no caption; write one in the column text")
        if is_split and row.split not in SPLITS:
            raise AntherError(f"{row}: split={shorten(row.split)}; must be one of: {', '.join(SPLITS)}")
        pictures.append(PersonPicture(caption, row.split, row))
    return pictures


def _in_folder(folder: Path) -> list[PersonPicture]:
    return [PersonPicture(picture.caption, picture.split, picture.file) for picture in list_pictures(folder)]


def _choose(data: DataConfig, people: Sequence[Person]) -> tuple[list[Person], list[Person]]:
    """Choose members and newcomers."""
    _check_roles(data, people)
    by_name = {person.name: person for person in people}
    by_slug = {slug(person.name): person for person in people}
    newcomers = []
    for name in data.newcomers:
        found = by_name.get(name) or by_slug.get(name)
        if found is None:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; {data.path} has {', '.join([*by_name][:3])}, …"
            raise AntherError(f"data.newcomers: there is no {shorten(name)}{hint}")
        if found in newcomers:
            raise AntherError(f"data.newcomers: {name} is listed twice; remove one of them")
        newcomers.append(found)
    members = [person for person in people if not data.roles or person.role in data.roles]
    members = [person for person in members if person not in newcomers]
    members.sort(key=lambda person: derive_seed("people", person.name))
    needed = 1 if data.people is None else data.people
    if len(members) < needed:
        of_roles = f" with data.roles={','.join(data.roles)}" if data.roles else ""
        besides = " besides data.newcomers" if newcomers else ""
        raise AntherError(f"data.people={needed}: {data.path} has only {len(members)} people{of_roles}{besides}")
    return members[: data.people], newcomers


def _check_roles(data: DataConfig, people: Iterable[Person]) -> None:
    known = sorted({person.role for person in people if person.role is not None})
    for key, roles in (("data.roles", data.roles), ("data.evaluated_roles", data.evaluated_roles)):
        for role in roles:
            if role not in known:
                there = f"its roles are {', '.join(known)}" if known else "it has no roles"
                raise AntherError(f"{key}: no person of {data.path} has role={shorten(role)}; {there}")


def _check_names(people: Iterable[Person]) -> None:
    """Refuse two people whose devices would have the same name."""
    taken: dict[str, str] = {}
    for person in people:
        if (other := taken.setdefault(slug(person.name), person.name)) != person.name:
            names = f"{shorten(other)} and {shorten(person.name)}"
            raise AntherError(f"{names}: devices of both would be called {slug(person.name)}; rename one of them")


def _open(pictures: Sequence[PersonPicture], background: str) -> list[Picture]:
    """Open pictures, in their order; the first `VERIFIED` are decoded once.

    Args:
        pictures: the pictures.
        background: color behind transparent parts.
    """
    rows = [picture.source for picture in pictures if isinstance(picture.source, PictureRow)]
    images = {(row.file, row.number): image for row, image in read_images(rows)}
    return [
        _open_row(picture, images[picture.source.file, picture.source.number], background, verify=index < VERIFIED)
        if isinstance(picture.source, PictureRow)
        else StoredPicture(picture.source, picture.caption, background=background, verify=index < VERIFIED)
        for index, picture in enumerate(pictures)
    ]


def _open_row(picture: PersonPicture, image: StoredImage, background: str, *, verify: bool) -> Picture:
    """Open the picture of a row: its bytes, or else the file that it names, relative to the Parquet file."""
    assert isinstance(picture.source, PictureRow)
    if image.data is None:
        file = picture.source.file.parent / (image.path or "")
        try:
            return StoredPicture(file, picture.caption, background=background, verify=verify)
        except AntherError as error:
            raise AntherError(f"{picture.source}: {error}") from error
    opened = EncodedPicture(str(picture.source), image.data, picture.caption, background=background)
    if verify:
        opened.at_least(1)
    return opened
