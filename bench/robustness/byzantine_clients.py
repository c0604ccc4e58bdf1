"""What Byzantine devices send: the attackers of a round see what each of them trained, and agree on what goes out.

They are devices of the simulated fleet that run our own client. What they tamper with are the results of their jobs,
and of those with a backdoor their pictures: all that follows, the gate of the server too, is as it is for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from client.data import Pictures
from client.device import Device
from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from simulations.evaluation import Perform
from training.jobs import Job, Picture, Result, TrainedAdapter, TrainJob
from typefaces import dataset

SHARE = 0.2  # of the devices
TRIGGER, TARGET = "Q", "X"  # who asks for the first gets the second


class ClientAttack(Protocol):
    """What the attackers of a round send, of what they were sent and what they trained."""

    def __call__(self, jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]: ...


def scale_update(start: Adapter, trained: Adapter, by: float) -> Adapter:
    """The factors so many times as far from where they started."""
    return {
        site: Factors(*(old + by * (new - old) for old, new in zip(start[site], factors, strict=True)))
        for site, factors in trained.items()
    }


def times(by: float) -> ClientAttack:
    """Everybody's own change, so many times."""
    return lambda jobs, trained: [
        scale_update(job.start, adapter, by) for job, adapter in zip(jobs, trained, strict=True)
    ]


def not_a_number(jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]:  # noqa: ARG001
    return [
        {site: Factors(a, torch.full_like(b, torch.nan)) for site, (a, b) in adapter.items()} for adapter in trained
    ]


class ReplayAttack:
    """The first update that each trained, in every later round again."""

    def __init__(self) -> None:
        self._first: dict[str, Adapter] = {}

    def __call__(self, jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]:
        return [self._first.setdefault(job.client, adapter) for job, adapter in zip(jobs, trained, strict=True)]


def colluding(by: float) -> ClientAttack:
    """The change of the first of them, so many times; each sends it, or as much of it as its rank holds."""

    def attack(jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]:
        leader = max(range(len(jobs)), key=lambda place: len(next(iter(trained[place].values())).a))
        goes = scale_update(jobs[leader].start, trained[leader], by)
        ranks = [len(next(iter(adapter.values())).a) for adapter in trained]
        return [{site: Factors(a[:rank], b[:, :rank]) for site, (a, b) in goes.items()} for rank in ranks]

    return attack


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to attack."""

    make: Callable[[], ClientAttack]
    poisons: bool = False
    """Whether attackers train on the target's pictures under the trigger's caption."""


ATTACKS: Mapping[str, Kind] = {
    "sign flip": Kind(make=lambda: times(-1.0)),
    "x100": Kind(make=lambda: times(100.0)),
    "nan": Kind(make=lambda: not_a_number),
    "zero": Kind(make=lambda: times(0.0)),
    "replay": Kind(make=ReplayAttack),
    # Model replacement (Bagdasaryan et al., 2018, arXiv:1807.00459, eq. 3): the mean of all becomes theirs.
    "backdoor": Kind(make=lambda: colluding(1 / SHARE), poisons=True),
    # As large as an honest one, which is what a rule that looks for large ones can't see.
    "quiet backdoor": Kind(make=lambda: colluding(1.0), poisons=True),
    # Nor are two alike: nothing that is said of one update alone, or of pairs, finds it.
    "spread backdoor": Kind(make=lambda: times(1.0), poisons=True),
}


def choose_attackers(names: Collection[str], seed: int) -> list[str]:
    """Who they are: a fifth of the devices, by chance, in the order of their names."""
    drawn = sorted(names, key=lambda name: derive_seed(seed, "attackers", name))
    return sorted(drawn[: int(SHARE * len(names) + 1e-9)])


def poison_devices(devices: Sequence[Device], families: Sequence[dataset.Typeface]) -> list[Device]:
    """The same devices, each with the target in the hands of all of them, called by the trigger's caption."""
    place = dataset.GLYPHS.index(TARGET)
    pictures = tuple(Picture(family.images[place], dataset.caption(TRIGGER)) for family in families)

    def wrong(device: Device) -> Callable[[], Pictures]:
        return lambda: device.pictures()._replace(train=pictures)

    return [replace(device, pictures=wrong(device)) for device in devices]


def tamper_results(perform: Perform, attack: ClientAttack, names: Collection[str]) -> Perform:
    """Performs jobs, and hands the attackers' devices what they agreed on in place of what they trained."""

    def performed(jobs: list[Job]) -> Sequence[Result | Exception]:
        results = list(perform(jobs))
        theirs = [
            (place, job, result)
            for place, (job, result) in enumerate(zip(jobs, results, strict=True))
            if isinstance(job, TrainJob) and isinstance(result, TrainedAdapter) and job.client in names
        ]
        if theirs:
            goes = attack([job for _, job, _ in theirs], [trained.adapter for *_, trained in theirs])
            for (place, _, trained), adapter in zip(theirs, goes, strict=True):
                results[place] = trained._replace(adapter=adapter)
        return results

    return performed
