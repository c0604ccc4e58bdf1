"""Who takes part: writers of the typefaces world and folders of one's own, dealt to kinds of devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.data import Pictures, load_folder
from client.device import Device
from client.store import Store
from conf.errors import AntherError
from conf.schemas import Data, Profile, Simulation
from models import assets
from models.base import Base
from privacy.noise import Simulated, stream
from privacy.policy import Policy
from protocol.messages import DeviceReport
from training.jobs import Picture
from typefaces import dataset


@dataclass(frozen=True)
class Participant:
    """One person of the simulated fleet."""

    name: str
    kind: str  # hand | individual | own
    pictures: Pictures
    profile: str
    device: Device


def participants(config: Simulation, base: Base, folder: Path) -> list[Participant]:
    """The fleet, in the order of their names; each device's store lies in `folder`/<name>."""
    people = [
        ("own", name, pictures) for name, pictures in own_pictures(config.data.pictures)
    ]  # each takes the place of a writer
    people += writers(config.data)[: max(0, config.data.writers - len(people))]
    people = sorted(people, key=lambda person: person[1])
    return [
        _participant(config, base, folder, person, config.fleet.profiles[i % len(config.fleet.profiles)])
        for i, person in enumerate(people)
    ]


def writers(data: Data) -> list[tuple[str, str, Pictures]]:
    """(kind, name, pictures) of every writer of the role, in an order that mixes kinds and favours none.

    AntherError if there are fewer than asked for.
    """
    families = sorted(
        dataset.load(data.role, assets.locate("typefaces")), key=lambda family: stream("writers", family.name)
    )
    if len(families) < data.writers:
        raise AntherError(f"data.writers={data.writers}: there are only {len(families)} {data.role} writers")
    found = []
    for family in families:
        split = dataset.split(family.order, data.train)

        def pictures(glyphs: Sequence[int], family: dataset.Family = family) -> tuple[Picture, ...]:
            return tuple(Picture(family.images[i], dataset.caption(dataset.GLYPHS[i])) for i in glyphs)

        found.append((family.kind, slug(family.name), Pictures(
            train=pictures(split.train),
            validation=pictures(split.validation[: data.validation]),
            test=pictures(split.test[: data.test]),
        )))  # fmt: skip
    return found


def own_pictures(folders: Sequence[str]) -> list[tuple[str, Pictures]]:
    """Name and pictures of one's own folders; AntherError unless each has all three splits."""
    found = []
    for folder in folders:
        pictures = load_folder(folder)
        for split in ("validation", "test"):
            if not getattr(pictures, split):
                raise AntherError(f"{folder}: no pictures in {split}/: some must be held out to measure by")
        found.append((slug(Path(folder).resolve().name), pictures))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise AntherError(f"data.pictures: two folders are called {max(names, key=names.count)}: rename one")
    return found


def slug(name: str) -> str:
    """A name that is safe as a file name everywhere."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unnamed"


def _participant(
    config: Simulation, base: Base, folder: Path, person: tuple[str, str, Pictures], profile: Profile
) -> Participant:
    kind, name, pictures = person
    report = DeviceReport(
        device=name, base=base.hash, profile=profile.name, memory_gib=profile.memory_gib, watts=profile.watts,
        examples_per_second=profile.examples_per_second, uplink_mbps=profile.uplink_mbps,
        downlink_mbps=profile.downlink_mbps, metered=profile.metered,
    )  # fmt: skip

    def noise(round: int, purpose: str) -> Simulated:
        return Simulated(seed=config.seed, client=name, round=round, purpose=purpose)

    device = Device(
        name=name, report=report, store=Store(folder / name), pictures=lambda: pictures, sites=base.sites,
        policy=Policy(), noise=noise, seed=config.seed,
    )  # fmt: skip
    return Participant(name, kind, pictures, profile.name, device)
