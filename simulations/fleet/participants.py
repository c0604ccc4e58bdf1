"""Participants of a simulated fleet: writers, users' picture folders or people of a data set, assigned to devices.

There may be many more devices than writers. A device is a few small objects: its pictures are assembled on request, and
its state is in its storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from client.data import Pictures, fingerprint
from client.device import Device
from client.store.store import Store
from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.fleet import ProfileConfig
from conf.schemas.simulation import SimulationConfig
from conf.schemas.training import DataConfig
from models.base.base import Base
from models.diffusion.sites import resolve_sites
from privacy.noise import noise_source
from privacy.policy import Policy
from privacy.storage import Storage
from protocol.messages import DeviceReport
from simulations.fleet.costs import build_costs
from simulations.fleet.hardware import Hardware, build_hardware
from simulations.fleet.people import People, load_people
from simulations.fleet.writers import LETTERS, OWN, PICTURES, Writer, assign_writers, own_pictures, writers


@dataclass(frozen=True, slots=True)
class Participant:
    """Person of the simulated fleet, with a device."""

    name: str
    kind: str  # hand | individual | own | letters | pictures
    copy: int  # 0 for the first of a writer's devices
    hardware: Hardware
    device: Device
    role: str | None = None  # of a person of a data set
    newcomer: bool = False  # takes part in no round

    @property
    def profile(self) -> str:
        """Name of its hardware profile."""
        return self.hardware.profile.name

    @property
    def pictures(self) -> Pictures:
        return self.device.pictures()

    @property
    def has_letters(self) -> bool:
        """Whether its pictures are letters, which the judge can read."""
        return self.kind not in (OWN, PICTURES)


def load_pictures(data: DataConfig) -> People:
    """Load the people whose pictures are on the devices; their files are read here.

    Raises:
        AntherError: as for `load_people`, `own_pictures` and `writers`.
    """
    if data.path is not None:
        return load_people(data)
    people = [Writer(name, OWN, pictures) for name, pictures in own_pictures(data)]
    return People([*people, *writers(data)[: max(0, data.writers - len(people))]], [])  # each folder replaces a writer


def participants(
    config: SimulationConfig, base: Base, storage: Callable[[str], Storage], people: People | None = None
) -> list[Participant]:
    """Build the fleet of the rounds, sorted by name.

    Args:
        config: configuration of the run.
        base: base on every device.
        storage: device name -> storage of that device.
        people: result of `load_pictures`; None: call it.

    Raises:
        AntherError: two devices have the same name, or as for `load_pictures`.
    """
    members = (people or load_pictures(config.data)).members
    assigned = sorted(assign_writers(members, config.data.count()), key=lambda device: device[0])
    names = [name for name, *_ in assigned]
    if len(set(names)) < len(names):
        raise AntherError(f"two devices are called {max(names, key=names.count)}: rename a folder of data.pictures")
    return _build(config, base, storage, assigned)


def newcomers(
    config: SimulationConfig, base: Base, storage: Callable[[str], Storage], people: People
) -> list[Participant]:
    """Build the devices of people who join after the last round, sorted by name.

    Args:
        config: configuration of the run.
        base: base on every device.
        storage: device name -> storage of that device.
        people: result of `load_pictures`.
    """
    assigned = sorted(((writer.name, writer, 0) for writer in people.newcomers), key=lambda device: device[0])
    return [replace(person, newcomer=True) for person in _build(config, base, storage, assigned)]


def owners_policy(config: SimulationConfig) -> Policy:
    """Return the simulated owners' policy: it allows exactly the run's guarantee, and refuses other requests."""
    private = config.privacy
    if not private.of_examples:
        return Policy()
    measures = "noised" if config.private_eval.interval else "none"
    return Policy(max_epsilon=private.epsilon, delta=private.delta, measures=measures)


def select_evaluated(
    people: Sequence[Participant], devices: int | None, roles: Sequence[str] = ()
) -> list[Participant]:
    """Select the participants that get a personal adapter and are evaluated: one device of each writer first.

    Args:
        people: all participants.
        devices: number to select; None: one of each writer.
        roles: roles of the people to select; empty: all.

    Raises:
        AntherError: no participant has one of the roles, or there are too few with them.
    """
    for role in roles:
        if all(person.role != role for person in people):
            known = ", ".join(sorted({person.role for person in people if person.role}))
            raise AntherError(f"data.evaluated_roles: no device has role={role}; roles of the devices are {known}")
    people = [person for person in people if not roles or person.role in roles]
    if devices is None:
        return [person for person in people if not person.copy]
    if devices > len(people):
        raise AntherError(f"evaluation.devices={devices}: only {len(people)} devices have a role of evaluated_roles")
    order = sorted(people, key=lambda person: (person.copy, person.kind != OWN, derive_seed("judged", person.name)))
    return sorted(order[:devices], key=lambda person: person.name)


def own_pictures_hash(people: Iterable[Participant]) -> str | None:
    """Return the SHA-256 of all pictures that aren't typefaces, with their owners; None if there are none."""
    read = [person for person in people if person.kind in (OWN, LETTERS, PICTURES)]
    own = {person.name: [fingerprint(split) for split in person.pictures] for person in read}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest() if own else None


def _build(
    config: SimulationConfig,
    base: Base,
    storage: Callable[[str], Storage],
    assigned: Sequence[tuple[str, Writer, int]],
) -> list[Participant]:
    """Build the devices of (name, writer, copy), with the hardware of the fleet's profiles in turn."""
    policy = owners_policy(config)
    rank = config.adapter.shared.rank
    costs = build_costs(base, config.base, config.fleet.workload, rank=rank)
    kinds = build_hardware(config.fleet, costs, rank, base)
    return [
        _participant(config.seed, base, storage(name), policy, name, writer, copy, kinds[i % len(kinds)])
        for i, (name, writer, copy) in enumerate(assigned)
    ]


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
    return Participant(name, writer.kind, copy, kind, device, writer.role)


def _sites(profile: ProfileConfig, base: Base) -> tuple[str, ...]:
    assert profile.sites is not None
    key = f"fleet.profiles: {profile.name}: sites"
    return tuple(resolve_sites(base.sites, profile.sites, attention=base.attention, key=key))


def _own_pictures_of(writer: Writer) -> Pictures:
    return writer.pictures
