"""Attacks of Byzantine devices: the attackers of a round see each other's trained adapters and agree on their replies.

Attackers are devices of the simulated fleet that run the unmodified client. They tamper with the results of their jobs
and, for a backdoor, with their pictures. Everything after that, including the server's validation, is as for all
devices.
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

SHARE = 0.2  # fraction of the devices that attack
TRIGGER, TARGET = "Q", "X"  # a request for the trigger's glyph shall draw the target's glyph


class ClientAttack(Protocol):
    """Function from the attackers' jobs of a round and their trained adapters to the adapters that they send."""

    def __call__(self, jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]: ...


def scale_update(start: Adapter, trained: Adapter, by: float) -> Adapter:
    """Scale an update: `start + by * (trained - start)` for each factor.

    Args:
        start: adapter before training.
        trained: adapter after training.
        by: the factor.
    """
    return {
        site: Factors(*(old + by * (new - old) for old, new in zip(start[site], factors, strict=True)))
        for site, factors in trained.items()
    }


def scaling_attack(by: float) -> ClientAttack:
    """Return an attack that multiplies each attacker's own update by a factor."""
    return lambda jobs, trained: [
        scale_update(job.start, adapter, by) for job, adapter in zip(jobs, trained, strict=True)
    ]


def nan_attack(jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]:  # noqa: ARG001
    """Send NaN in every B."""
    return [
        {site: Factors(a, torch.full_like(b, torch.nan)) for site, (a, b) in adapter.items()} for adapter in trained
    ]


class ReplayAttack:
    """Attack that sends each attacker's first update in every later round."""

    def __init__(self) -> None:
        self._first: dict[str, Adapter] = {}

    def __call__(self, jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]:
        return [self._first.setdefault(job.client, adapter) for job, adapter in zip(jobs, trained, strict=True)]


def collusion_attack(by: float) -> ClientAttack:
    """Return an attack that sends the first attacker's update times a factor, truncated to each attacker's rank."""

    def attack(jobs: Sequence[TrainJob], trained: Sequence[Adapter]) -> Sequence[Adapter]:
        leader = max(range(len(jobs)), key=lambda index: len(next(iter(trained[index].values())).a))
        update = scale_update(jobs[leader].start, trained[leader], by)
        ranks = [len(next(iter(adapter.values())).a) for adapter in trained]
        return [{site: Factors(a[:rank], b[:, :rank]) for site, (a, b) in update.items()} for rank in ranks]

    return attack


@dataclass(frozen=True, kw_only=True)
class AttackType:
    """Type of attack."""

    make: Callable[[], ClientAttack]
    poisons: bool = False
    """Whether attackers train on the target's pictures with the trigger's caption."""


ATTACKS: Mapping[str, AttackType] = {
    "sign flip": AttackType(make=lambda: scaling_attack(-1.0)),
    "x100": AttackType(make=lambda: scaling_attack(100.0)),
    "nan": AttackType(make=lambda: nan_attack),
    "zero": AttackType(make=lambda: scaling_attack(0.0)),
    "replay": AttackType(make=ReplayAttack),
    # Model replacement (Bagdasaryan et al., 2018, arXiv:1807.00459, eq. 3): the mean becomes the attackers' adapter.
    "backdoor": AttackType(make=lambda: collusion_attack(1 / SHARE), poisons=True),
    # No larger than an honest update, so a rule that looks for large updates doesn't find it.
    "quiet backdoor": AttackType(make=lambda: collusion_attack(1.0), poisons=True),
    # Updates also differ from each other, so neither a test of single updates nor of pairs finds it.
    "spread backdoor": AttackType(make=lambda: scaling_attack(1.0), poisons=True),
}


def choose_attackers(names: Collection[str], seed: int) -> list[str]:
    """Choose a fifth of the devices at random, and return their names in order."""
    shuffled = sorted(names, key=lambda name: derive_seed(seed, "attackers", name))
    return sorted(shuffled[: int(SHARE * len(names) + 1e-9)])


def poison_devices(devices: Sequence[Device], families: Sequence[dataset.Typeface]) -> list[Device]:
    """Return the devices with the target's pictures of all families as training set, under the trigger's caption."""
    glyph = dataset.GLYPHS.index(TARGET)
    pictures = tuple(Picture(family.images[glyph], dataset.caption(TRIGGER)) for family in families)

    def poisoned(device: Device) -> Callable[[], Pictures]:
        return lambda: device.pictures()._replace(train=pictures)

    return [replace(device, pictures=poisoned(device)) for device in devices]


def tamper_results(perform: Perform, attack: ClientAttack, names: Collection[str]) -> Perform:
    """Wrap `perform` so that the named devices' results are replaced by those of the attack.

    Args:
        perform: performs jobs.
        attack: computes the attackers' adapters.
        names: names of the attackers.
    """

    def performed(jobs: list[Job]) -> Sequence[Result | Exception]:
        results = list(perform(jobs))
        attacked = [
            (index, job, result)
            for index, (job, result) in enumerate(zip(jobs, results, strict=True))
            if isinstance(job, TrainJob) and isinstance(result, TrainedAdapter) and job.client in names
        ]
        if attacked:
            replacements = attack([job for _, job, _ in attacked], [trained.adapter for *_, trained in attacked])
            for (index, _, trained), adapter in zip(attacked, replacements, strict=True):
                results[index] = trained._replace(adapter=adapter)
        return results

    return performed
