"""Who takes part: writers of the typefaces world and folders of one's own, dealt to devices of many kinds.

There may be far more devices than writers. A device is a few small objects: pictures are put together when it is asked
for something, and what it keeps lies in its storage.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from client.data import Pictures, fingerprint, load_folder
from client.device import Device
from client.store.store import Store
from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.simulation import DataConfig, ProfileConfig, SimulationConfig
from models.base import assets
from models.base.base import Base
from privacy.noise import noise_source
from privacy.policy import Policy
from privacy.storage import Storage
from protocol.messages import DeviceReport
from simulations.fleet.costs import costs
from simulations.fleet.hardware import Hardware, hardware
from training.jobs import Picture
from typefaces import dataset


@dataclass(frozen=True)
class Writer:
    """Whose pictures a device holds."""

    name: str
    kind: str  # hand | individual | own
    pictures: Pictures  # of the first of this writer's devices
    pool: tuple[Picture, ...] = ()  # what the others draw theirs from

    def on(self, device: str) -> Pictures:
        """The pictures of a further device: other ones to train on, by its name; the same to stop and measure by."""
        chosen = random.Random(derive_seed("pictures", device)).sample(self.pool, len(self.pictures.train))
        return self.pictures._replace(train=tuple(chosen))


@dataclass(frozen=True, slots=True)
class Participant:
    """One person of the simulated fleet."""

    name: str
    kind: str  # hand | individual | own
    copy: int  # 0 for the first of a writer's devices
    hardware: Hardware
    device: Device

    @property
    def profile(self) -> str:
        """The name of its kind of device."""
        return self.hardware.profile.name

    @property
    def pictures(self) -> Pictures:
        return self.device.pictures()


def participants(
    config: SimulationConfig,
    base: Base,
    storage: Callable[[str], Storage],
    own: Sequence[tuple[str, Pictures]] | None = None,
) -> list[Participant]:
    """The fleet, in the order of names; AntherError if two have one name.

    Args:
        storage: where the device of a name keeps what is its own.
        own: `own_pictures` of the configuration, if they were read already.
    """
    people = [Writer(name, "own", pictures) for name, pictures in (own_pictures(config.data) if own is None else own)]
    people += writers(config.data)[: max(0, config.data.writers - len(people))]  # each folder takes a writer's place
    dealt = sorted(assign_writers(people, config.data.count()), key=lambda device: device[0])
    names = [name for name, *_ in dealt]
    if len(set(names)) < len(names):
        raise AntherError(f"two devices are called {max(names, key=names.count)}: rename a folder of data.pictures")
    policy = owners_policy(config)
    kinds = hardware(config.fleet, costs(config, base), config.adapter.shared.rank, base)
    return [
        _participant(config, base, storage(name), policy, name, writer, copy, kinds[i % len(kinds)])
        for i, (name, writer, copy) in enumerate(dealt)
    ]


def owners_policy(config: SimulationConfig) -> Policy:
    """What the simulated owners allow: exactly what the run promises them, so that a run that breaks it is refused."""
    private = config.privacy
    if not private.of_examples:
        return Policy()
    return Policy(
        max_epsilon=private.epsilon, delta=private.delta, measures="noised" if private.measuring.every else "none"
    )


def assign_writers(people: Sequence[Writer], devices: int) -> Iterator[tuple[str, Writer, int]]:
    """(name, writer, which of the writer's) of every device, the writers in turn: ada, bob, ada-0002, bob-0002, …"""
    for i in range(devices):
        copy, place = divmod(i, len(people))
        name = people[place].name
        yield f"{name}-{copy + 1:04d}" if copy else name, people[place], copy


def judged(people: Sequence[Participant], devices: int | None) -> list[Participant]:
    """Those that get a personal adapter and are judged: first one device of each writer, then the further ones.

    Args:
        devices: how many; None: one of each writer.
    """
    if devices is None:
        return [person for person in people if not person.copy]
    order = sorted(people, key=lambda person: (person.copy, person.kind != "own", derive_seed("judged", person.name)))
    return sorted(order[:devices], key=lambda person: person.name)


def writers(data: DataConfig) -> list[Writer]:
    """Every writer of the role, in an order that mixes kinds and favours none; AntherError if there are too few."""
    families = sorted(
        dataset.load(data.role, assets.locate("typefaces")), key=lambda family: derive_seed("writers", family.name)
    )
    if len(families) < data.writers:
        raise AntherError(
            f"data.writers={data.writers}: there are only {len(families)} {data.role} writers; "
            "for more devices than that, set data.devices"
        )
    found = []
    for place, family in enumerate(families):
        kind = dataset.GLYPH_KINDS[place % len(dataset.GLYPH_KINDS)]
        split = dataset.split(dataset.skew_order(family.order, kind) if data.skew else family.order, data.train)

        def pictures(glyphs: Sequence[int], family: dataset.Typeface = family) -> tuple[Picture, ...]:
            return tuple(Picture(family.images[i], dataset.caption(dataset.GLYPHS[i])) for i in glyphs)

        found.append(
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
    return found


def own_pictures(data: DataConfig) -> list[tuple[str, Pictures]]:
    """Name and pictures of one's own folders; AntherError unless each has all three splits."""
    found = []
    for folder in data.pictures:
        pictures = load_folder(folder, background=data.background)
        for split in ("validation", "test"):
            if not getattr(pictures, split):
                raise AntherError(
                    f"{folder}: no pictures for {split}: some must be held out to measure by; add some, or sort them "
                    "into folders train, validation and test"
                )
        found.append((slug(Path(folder).resolve().name), pictures))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise AntherError(f"data.pictures: two folders are called {max(names, key=names.count)}: rename one")
    return found


def identity(people: Iterable[Participant]) -> str | None:
    """SHA-256 of all pictures that are somebody's own, with whose they are; None if there are none."""
    own = {person.name: [fingerprint(split) for split in person.pictures] for person in people if person.kind == "own"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest() if own else None


def slug(name: str) -> str:
    """A name that is safe as a file name everywhere."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unnamed"


def _participant(
    config: SimulationConfig,
    base: Base,
    storage: Storage,
    policy: Policy,
    name: str,
    writer: Writer,
    copy: int,
    kind: Hardware,
) -> Participant:
    profile = kind.profile
    report = DeviceReport(
        device=name,
        base=base.hash,
        profile=profile.name,
        memory_gib=kind.memory_gib,
        watts=kind.watts,
        examples_per_second=kind.examples_per_second,
        uplink_mbps=profile.uplink_mbps,
        downlink_mbps=profile.downlink_mbps,
        metered=profile.metered,
        rank=profile.rank,
        sites=None if profile.sites is None else _sites(profile, base),
    )
    device = Device(
        name=name,
        report=report,
        store=Store(storage),
        pictures=partial(writer.on, name) if copy else partial(_first, writer),
        sites=base.sites,
        policy=policy,
        noise=partial(noise_source, client=name, seed=config.seed),
        seed=config.seed,
        resolution=base.resolution,
    )
    return Participant(name, writer.kind, copy, kind, device)


def _sites(profile: ProfileConfig, base: Base) -> tuple[str, ...]:
    assert profile.sites is not None
    found = tuple(name for name in base.sites if re.fullmatch(profile.sites, name))
    if not found:
        raise AntherError(f"fleet.profiles: sites={profile.sites} of {profile.name}: the base has none such")
    return found


def _first(writer: Writer) -> Pictures:
    return writer.pictures
