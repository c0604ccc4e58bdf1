"""A real device on data sets that differ by one picture, with all noise left out.

What may be known before a release is made equal in both runs, as adaptive composition allows: the adapters sent, and
every release so far. A release is looked at where it is handed over, to the optimiser, so that whatever comes before is
on trial; then another one, the same in both runs, takes its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client.data import Pictures
from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from common.seeding import derive_seed
from models.base.base import Base
from models.lora.adapter import Adapter, Factors, to_tensors
from models.lora.lora_xs import to_tensors_with_bases
from privacy.noise import CPU, NoiseSource
from protocol import tensor_codec
from protocol.messages import Personalize, Reply, Request, Train, TrainingPlan
from tests.helpers.devices import PRIVACY, make_device
from tests.helpers.reference_trainer import live, random_bases
from training import jobs
from training.engine import perform
from training.jobs import Job, Picture, Result
from training.optimizer import AdamW

PLENTY = 2**30
SENT, STEPS, DIVISOR = 3, 4, 4  # directions sent, steps of a round, and what a plan has sums divided by

Change = Callable[[jobs.TrainJob, Device], jobs.TrainJob]


class Still:
    """No noise; whoever joins a batch does so by who it is, not by its place among the others.

    Args:
        members: the numbers of those that are there.
        batches: the numbers that join each batch, if they are there; after these everybody.
    """

    release = False

    def __init__(self, members: Sequence[int] = (), batches: Sequence[Collection[int]] = ()) -> None:
        self._members, self._batches = list(members), iter(batches)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        assert size == len(self._members)
        joining = next(self._batches, self._members)
        return torch.tensor([place for place, who in enumerate(self._members) if who in joining], dtype=torch.long)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return torch.zeros(size, dtype=torch.int64, device=device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of training in private that a device allows."""

    clip: float = 1e-4  # every gradient of the tiny base is far longer
    rank: int = SENT
    trains: str = "both"
    every: int = 1  # of the sites, one in so many is trained
    draws: int = 1
    memory: int = PLENTY
    update: str = "fp32"  # otherwise half of it, and the rest with the next round's
    change: Change = lambda job, _device: job  # for what the trainer allows and no plan asks for


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a device did in two rounds, with a personal adapter trained in between."""

    sums: list[list[Tensor]]
    """Of each round, what each step's noise was to hide [D]."""
    replies: list[Reply]
    personal: Tensor


def picture(seed: int) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8), f"picture {seed}")


def device_on(
    base: Base, folder: Path, name: str, pictures: Pictures, noise: Callable[[int, str], NoiseSource]
) -> Device:
    """A device that holds this base."""
    made = make_device(folder / name, name=name, pictures=pictures)
    report = dataclasses.replace(made.report, base=base.hash)
    return dataclasses.replace(made, report=report, sites=base.sites, noise=noise)


def plan(base: Base, **changes: object) -> TrainingPlan:
    """What a device is asked to do, without privacy."""
    usual = TrainingPlan(
        run="run", round=0, base=base.hash, rank=SENT, steps=STEPS, batch_size=DIVISOR, learning_rate=1e-2
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def adapter(base: Base, seed: int, between: Adapter | None = None) -> Adapter:
    """What the server sends, no factor of it zero; with a frame, of cores between its factors."""
    found = {name: Factors(*(part.float() for part in pair)) for name, pair in live(base, SENT, seed).items()}
    if between is None:
        return found
    return {name: Factors(a, left @ (left.T @ found[name].b)) for name, (a, left) in between.items()}


def fixed(base: Base) -> Adapter:
    """A frame, as it travels."""
    return {name: Factors(*(part.float() for part in pair)) for name, pair in random_bases(base, SENT, 0).items()}


def personalise(sent: Adapter, number: int) -> Personalize:
    """A personal adapter that fits its pictures closely: with other pictures it is quite another."""
    return Personalize(
        run="run",
        round=number,
        adapter=tensor_codec.encode(to_tensors(sent)),
        rank=2,
        steps=3,
        batch_size=3,
        learning_rate=0.1,
        look_every=3,
        patience=1,
    )


def two_rounds(
    base: Base,
    folder: Path,
    pictures: Sequence[Picture],
    members: Sequence[int],
    mode: Mode,
    batches: Sequence[Collection[int]],
) -> Seen:
    """`client.rounds.handler` and `training.engine` on those of the pictures that are there.

    Args:
        members: the places of those that are there.
        batches: the places of those that join each step, if they are there.
    """
    held = Pictures(tuple(pictures[member] for member in members), (), ())
    device = device_on(base, folder, "d", held, lambda _round, _purpose: Still(members, batches))
    between = fixed(base) if mode.trains == "cores" else None
    privacy = dataclasses.replace(PRIVACY, clip=mode.clip, draws=mode.draws)
    sums: list[list[Tensor]] = []

    def performed(asked: list[Job]) -> Sequence[Result | Exception]:
        (job,) = asked
        if not (isinstance(job, jobs.TrainJob) and job.privacy):
            return perform(base, asked, memory=PLENTY, timesteps=2)
        with told_the_optimiser(mode.clip, job.round) as told:
            found = perform(base, [mode.change(job, device)], memory=mode.memory, timesteps=2)
        sums.append(told)
        return found

    def ask(request: Request) -> Reply:
        outcome = run_handlers({"d": handle(request, device)}, performed)["d"]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def train(number: int) -> Reply:
        sent = adapter(base, number, between)
        tensors = to_tensors_with_bases(sent, between) if between else to_tensors(sent)
        asked = plan(base, round=number, rank=mode.rank, trains=mode.trains, privacy=privacy)
        if mode.every > 1:
            asked = dataclasses.replace(asked, sites=tuple(base.sites)[:: mode.every])
        if mode.update != "fp32":
            asked = dataclasses.replace(asked, update=mode.update, keep=0.5, feedback=True)
        return ask(Train(plan=asked, adapter=tensor_codec.encode(tensors)))

    replies = [train(1), ask(personalise(adapter(base, 1, between), 1)), train(2)]
    kept = device.store.personal(base.sites)
    assert kept is not None
    return Seen(sums, replies, torch.cat([part.flatten() for pair in kept.adapter.values() for part in pair]))


@contextmanager
def told_the_optimiser(length: float, key: int) -> Iterator[list[Tensor]]:
    """What each step tells it, in units of the sum, float64 [D]; it hears something else, of about this length."""
    told: list[Tensor] = []
    really = AdamW.step

    def step(self: AdamW, rows: Sequence[int], gradients: Tensor) -> None:
        (gradient,) = gradients.double()
        told.append(gradient * DIVISOR)
        drawn = torch.randn(len(gradient), generator=torch.Generator().manual_seed(derive_seed(key, len(told))))
        really(self, rows, (drawn * length / DIVISOR / len(drawn) ** 0.5).to(gradients)[None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        yield told


def distances(one: Seen, other: Seen) -> Tensor:
    """By how much the sums of two runs differ, in L2 norm: [rounds, steps]."""
    pairs = zip(one.sums, other.sums, strict=True)
    return torch.stack([torch.stack(a).sub(torch.stack(b)).norm(dim=1) for a, b in pairs])
