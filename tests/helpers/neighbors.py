"""Run a real device, without noise, on data sets that differ by one picture.

Everything that is known before a release is made equal in both runs, as adaptive composition allows: the sent adapters,
and all earlier releases. A release is intercepted where it is passed to the optimizer, so that all code before it is
tested. The optimizer then gets another value, the same in both runs.
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
from tests.helpers.reference_trainer import nonzero_adapter, random_bases
from training import jobs
from training.engine import perform
from training.jobs import Job, Picture, Result
from training.optimizer import AdamW

PLENTY = 2**30
SENT, STEPS, DIVISOR = 3, 4, 4  # rank of the sent adapter, steps of a round, and the plan's divisor

Change = Callable[[jobs.TrainJob, Device], jobs.TrainJob]


class NoNoise:
    """Noise source without noise, whose batches depend on the identities of pictures, not on their positions.

    Args:
        members: numbers of the existing pictures.
        batches: numbers that join each batch if they exist; later batches have all members.
    """

    release = False

    def __init__(self, members: Sequence[int] = (), batches: Sequence[Collection[int]] = ()) -> None:
        self._members, self._batches = list(members), iter(batches)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        assert size == len(self._members)
        members_of_batch = next(self._batches, self._members)
        return torch.tensor(
            [index for index, who in enumerate(self._members) if who in members_of_batch], dtype=torch.long
        )

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return torch.zeros(size, dtype=torch.int64, device=device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingMode:
    """A configuration of private training that a device allows."""

    clip: float = 1e-4  # far below every gradient norm of the tiny base
    rank: int = SENT
    trains: str = "both"
    every: int = 1  # train every n-th site
    draws: int = 1
    memory: int = PLENTY
    update: str = "fp32"  # otherwise half of the blocks, and the rest with the next round
    change: Change = lambda job, _device: job  # for options of the trainer that no plan sets


@dataclasses.dataclass(frozen=True)
class DeviceOutputs:
    """Outputs of a device in two rounds, with a personal adapter trained in between."""

    sums: list[list[Tensor]]
    """For each round, the sums [D] that the noise of each step would hide."""
    replies: list[Reply]
    personal: Tensor


def random_picture(seed: int) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8), f"picture {seed}")


def device_with_base(
    base: Base, folder: Path, name: str, pictures: Pictures, noise: Callable[[int, str], NoiseSource]
) -> Device:
    """A device that holds this base."""
    device = make_device(folder / name, name=name, pictures=pictures)
    report = dataclasses.replace(device.report, base=base.hash)
    return dataclasses.replace(device, report=report, sites=base.sites, noise=noise)


def plan(base: Base, **changes: object) -> TrainingPlan:
    """A training plan, without privacy unless set."""
    usual = TrainingPlan(
        run="run", round=0, base=base.hash, rank=SENT, steps=STEPS, batch_size=DIVISOR, learning_rate=1e-2
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def adapter(base: Base, seed: int, between: Adapter | None = None) -> Adapter:
    """The adapter that the server sends, with no zero factor; with LoRA-XS bases, cores between them."""
    result = {
        name: Factors(*(part.float() for part in pair)) for name, pair in nonzero_adapter(base, SENT, seed).items()
    }
    if between is None:
        return result
    return {name: Factors(a, left @ (left.T @ result[name].b)) for name, (a, left) in between.items()}


def lora_xs_bases(base: Base) -> Adapter:
    """LoRA-XS bases in the precision in which they are sent."""
    return {name: Factors(*(part.float() for part in pair)) for name, pair in random_bases(base, SENT, 0).items()}


def personalize_request(sent: Adapter, number: int) -> Personalize:
    """Train a personal adapter that fits its pictures closely, so that it is very different for other pictures."""
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
    mode: TrainingMode,
    batches: Sequence[Collection[int]],
) -> DeviceOutputs:
    """Run `client.rounds.handler` and `training.engine` on a subset of the pictures.

    Args:
        base: the base.
        folder: folder of the device.
        pictures: all pictures.
        members: indices of the existing pictures.
        mode: configuration of training.
        batches: indices that join each step, if they exist.
    """
    held_pictures = Pictures(tuple(pictures[member] for member in members), (), ())
    device = device_with_base(base, folder, "d", held_pictures, lambda _round, _purpose: NoNoise(members, batches))
    between = lora_xs_bases(base) if mode.trains == "cores" else None
    privacy = dataclasses.replace(PRIVACY, clip=mode.clip, draws=mode.draws)
    sums: list[list[Tensor]] = []

    def run_jobs(asked: list[Job]) -> Sequence[Result | Exception]:
        (job,) = asked
        if not (isinstance(job, jobs.TrainJob) and job.privacy):
            return perform(base, asked, memory=PLENTY, timesteps=2)
        with intercept_gradients(mode.clip, job.round) as intercepted:
            result = perform(base, [mode.change(job, device)], memory=mode.memory, timesteps=2)
        sums.append(intercepted)
        return result

    def ask(request: Request) -> Reply:
        outcome = run_handlers({"d": handle(request, device)}, run_jobs)["d"]
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

    replies = [train(1), ask(personalize_request(adapter(base, 1, between), 1)), train(2)]
    personal = device.store.personal(base.sites)
    assert personal is not None
    return DeviceOutputs(
        sums, replies, torch.cat([part.flatten() for pair in personal.adapter.values() for part in pair])
    )


@contextmanager
def intercept_gradients(length: float, key: int) -> Iterator[list[Tensor]]:
    """Record the optimizer's input at each step, in units of the sum, float64 [D], and replace it by another of similar
    norm.
    """
    intercepted: list[Tensor] = []
    really = AdamW.step

    def step(self: AdamW, rows: Sequence[int], gradients: Tensor) -> None:
        (gradient,) = gradients.double()
        intercepted.append(gradient * DIVISOR)
        drawn = torch.randn(len(gradient), generator=torch.Generator().manual_seed(derive_seed(key, len(intercepted))))
        really(self, rows, (drawn * length / DIVISOR / len(drawn) ** 0.5).to(gradients)[None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        yield intercepted


def distances(one: DeviceOutputs, other: DeviceOutputs) -> Tensor:
    """L2 distances of the sums of two runs: [rounds, steps]."""
    pairs = zip(one.sums, other.sums, strict=True)
    return torch.stack([torch.stack(a).sub(torch.stack(b)).norm(dim=1) for a, b in pairs])
