"""Writers of the typefaces data and users' picture folders, the sources of the devices' pictures."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.data import Pictures, load_folder
from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.training import DataConfig
from models.files import assets
from training.jobs import Picture
from typefaces import dataset

LETTERS, PICTURES, OWN = "letters", "pictures", "own"
"""Kinds of people other than typefaces: people of a data set, with letters or other pictures, and users."""


@dataclass(frozen=True)
class Writer:
    """Source of a device's pictures."""

    name: str
    kind: str  # hand | individual | own | letters | pictures
    pictures: Pictures  # of this writer's first device
    pool: tuple[Picture, ...] = ()  # training pictures of the writer's other devices are drawn from it
    role: str | None = None  # of a person of a data set

    def pictures_for(self, device: str) -> Pictures:
        """Return the pictures of another device: training pictures drawn by its name, the same held-out pictures."""
        train = random.Random(derive_seed("pictures", device)).sample(self.pool, len(self.pictures.train))
        return self.pictures._replace(train=tuple(train))


def assign_writers(people: Sequence[Writer], devices: int) -> Iterator[tuple[str, Writer, int]]:
    """Yield (name, writer, copy) of every device, the writers in turn: ada, bob, ada-0002, bob-0002, …"""
    for i in range(devices):
        copy, index = divmod(i, len(people))
        name = people[index].name
        yield f"{name}-{copy + 1:04d}" if copy else name, people[index], copy


def writers(data: DataConfig) -> list[Writer]:
    """Load the writers of the role, in an order in which kinds are mixed; AntherError if there are too few."""
    families = sorted(
        dataset.load(data.role, assets.locate("typefaces")), key=lambda family: derive_seed("writers", family.name)
    )
    if len(families) < data.writers:
        raise AntherError(
            f"data.writers={data.writers}: there are only {len(families)} {data.role} writers; "
            "for more devices than writers, set data.devices"
        )
    loaded = []
    for index, family in enumerate(families[: data.writers]):
        kind = dataset.GLYPH_KINDS[index % len(dataset.GLYPH_KINDS)]
        split = dataset.split(dataset.skew_order(family.order, kind) if data.label_skew else family.order, data.train)

        def pictures(glyphs: Sequence[int], family: dataset.Typeface = family) -> tuple[Picture, ...]:
            return tuple(Picture(family.images[i], dataset.caption(dataset.GLYPHS[i])) for i in glyphs)

        loaded.append(
            Writer(
                slug(family.name),
                family.kind,
                Pictures(
                    train=pictures(split.train),
                    validation=pictures(split.validation[: data.validation]),
                    test=pictures(split.test[: data.test]),
                ),
                pool=pictures(dataset.split(family.order, dataset.POOL).train),
            )
        )
    return loaded


def own_pictures(data: DataConfig) -> list[tuple[str, Pictures]]:
    """Load users' picture folders as (name, pictures).

    Raises:
        AntherError: a folder has no pictures for one of the splits, or two folders have the same name.
    """
    folders = []
    for folder in data.pictures:
        pictures = load_folder(folder, background=data.background)
        for split in ("validation", "test"):
            if not getattr(pictures, split):
                raise AntherError(
                    f"{folder}: no pictures for {split}: some must be held out for evaluation; add some, or sort them "
                    "into folders train, validation and test"
                )
        folders.append((slug(Path(folder).resolve().name), pictures))
    names = [name for name, _ in folders]
    if len(set(names)) < len(names):
        raise AntherError(f"data.pictures: two folders are called {max(names, key=names.count)}: rename one")
    return folders


def slug(name: str) -> str:
    """Convert a name to one that is safe as a file name on every system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unnamed"
