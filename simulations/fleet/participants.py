"""Participants of a simulated fleet: writers of the typefaces data and users' picture folders, assigned to devices.

There may be many more devices than writers. A device is a few small objects: its pictures are assembled on request, and
its state is in its storage.
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
from conf.schemas.fleet import ProfileConfig
from conf.schemas.simulation import SimulationConfig
from conf.schemas.training import DataConfig
from models.base.base import Base
from models.files import assets
from privacy.noise import noise_source
from privacy.policy import Policy
from privacy.storage import Storage
from protocol.messages import DeviceReport
from simulations.fleet.costs import build_costs
from simulations.fleet.hardware import Hardware, build_hardware
from training.jobs import Picture
from typefaces import dataset


@dataclass(frozen=True)
class Writer:
    """Source of a device's pictures."""

    name: str
    kind: str  # hand | individual | own
    pictures: Pictures  # of this writer's first device
    pool: tuple[Picture, ...] = ()  # training pictures of the writer's other devices are drawn from it

    def pictures_for(self, device: str) -> Pictures:
        """Return the pictures of another device: training pictures drawn by its name, the same held-out pictures."""
        train = random.Random(derive_seed("pictures", device)).sample(self.pool, len(self.pictures.train))
        return self.pictures._replace(train=tuple(train))


@dataclass(frozen=True, slots=True)
class Participant:
    """Person of the simulated fleet, with a device."""

    name: str
    kind: str  # hand | individual | own
    copy: int  # 0 for the first of a writer's devices
    hardware: Hardware
    device: Device

    @property
    def profile(self) -> str:
        """Name of its hardware profile."""
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
    """Build the fleet, sorted by name.

    Args:
        config: configuration of the run.
        base: base on every device.
        storage: device name -> storage of that device.
        own: result of `own_pictures`; None: call it.

    Raises:
        AntherError: two devices have the same name, or as for `own_pictures` and `writers`.
    """
    people = [Writer(name, "own", pictures) for name, pictures in (own_pictures(config.data) if own is None else own)]
    people += writers(config.data)[: max(0, config.data.writers - len(people))]  # each folder replaces a writer
    assigned = sorted(assign_writers(people, config.data.count()), key=lambda device: device[0])
    names = [name for name, *_ in assigned]
    if len(set(names)) < len(names):
        raise AntherError(f"two devices are called {max(names, key=names.count)}: rename a folder of data.pictures")
    policy = owners_policy(config)
    rank = config.adapter.shared.rank
    costs = build_costs(base, config.base, config.fleet.workload, rank=rank)
    kinds = build_hardware(config.fleet, costs, rank, base)
    return [
        _participant(config.seed, base, storage(name), policy, name, writer, copy, kinds[i % len(kinds)])
        for i, (name, writer, copy) in enumerate(assigned)
    ]


def owners_policy(config: SimulationConfig) -> Policy:
    """Return the simulated owners' policy: it allows exactly the run's guarantee, and refuses other requests."""
    private = config.privacy
    if not private.of_examples:
        return Policy()
    measures = "noised" if config.private_eval.interval else "none"
    return Policy(max_epsilon=private.epsilon, delta=private.delta, measures=measures)


def assign_writers(people: Sequence[Writer], devices: int) -> Iterator[tuple[str, Writer, int]]:
    """Yield (name, writer, copy) of every device, the writers in turn: ada, bob, ada-0002, bob-0002, …"""
    for i in range(devices):
        copy, index = divmod(i, len(people))
        name = people[index].name
        yield f"{name}-{copy + 1:04d}" if copy else name, people[index], copy


def select_evaluated(people: Sequence[Participant], devices: int | None) -> list[Participant]:
    """Select the participants that get a personal adapter and are evaluated: one device of each writer first.

    Args:
        people: all participants.
        devices: number to select; None: one of each writer.
    """
    if devices is None:
        return [person for person in people if not person.copy]
    order = sorted(people, key=lambda person: (person.copy, person.kind != "own", derive_seed("judged", person.name)))
    return sorted(order[:devices], key=lambda person: person.name)


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


def own_pictures_hash(people: Iterable[Participant]) -> str | None:
    """Return the SHA-256 of all users' own pictures with their owners; None if there are none."""
    own = {person.name: [fingerprint(split) for split in person.pictures] for person in people if person.kind == "own"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest() if own else None


def slug(name: str) -> str:
    """Convert a name to one that is safe as a file name on every system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unnamed"


def _participant(
    seed: int,
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
        rank=profile.max_rank,
        sites=None if profile.sites is None else _sites(profile, base),
    )
    device = Device(
        name=name,
        report=report,
        store=Store(storage),
        pictures=partial(writer.pictures_for, name) if copy else partial(_own_pictures_of, writer),
        sites=base.sites,
        policy=policy,
        noise=partial(noise_source, client=name, seed=seed),
        seed=seed,
        resolution=base.resolution,
    )
    return Participant(name, writer.kind, copy, kind, device)


def _sites(profile: ProfileConfig, base: Base) -> tuple[str, ...]:
    assert profile.sites is not None
    sites = tuple(name for name in base.sites if re.fullmatch(profile.sites, name))
    if not sites:
        raise AntherError(f"fleet.profiles: sites={profile.sites} of {profile.name} matches no site of the base")
    return sites


def _own_pictures_of(writer: Writer) -> Pictures:
    return writer.pictures
