"""A device with tiny pictures and sites, and a performer that replaces training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.data import Pictures
from client.device import Device
from client.store.store import Store
from models.lora.adapter import Adapter, Factors, Site, adapter_shapes, init_adapter, to_tensors
from privacy.accounting import PoissonGaussian, epsilon
from privacy.noise import NoiseSource, SecureNoise
from privacy.policy import Policy
from privacy.storage import FileStorage, Storage
from protocol import tensor_codec
from protocol.messages import DeviceReport, ExamplePrivacy, Train, TrainingPlan
from training import jobs
from training.jobs import Examples, GeneratedImages, Picture, Result, TrainedAdapter

SITES = {"down.to_q": Site(6, 4), "up.to_k": Site(3, 5)}
BASE = "b" * 64
PRIVACY = ExamplePrivacy(noise_multiplier=2.0, clip=0.01, sampling_rate=0.2, draws=1, delta=1e-3)


def picture(seed: int) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8), f"picture {seed}")


PICTURES = Pictures(tuple(map(picture, range(4))), tuple(map(picture, (4, 5))), (picture(6),))


def make_device(
    storage: Path | Storage,
    *,
    name: str = "d",
    pictures: Pictures = PICTURES,
    policy: Policy | None = None,
    noise: NoiseSource | None = None,
    check_memory: Callable[[int, Collection[str], int], None] = lambda *_: None,
) -> Device:
    """Create a device that stores its files in a folder, or that uses the given storage.

    Args:
        storage: folder or storage.
        name: the device's name.
        pictures: the owner's pictures.
        policy: the owner's policy; None: only δ is set.
        noise: the noise source; None: secure noise.
        check_memory: see `Device.check_memory`.
    """
    report = DeviceReport(
        device=name,
        base=BASE,
        profile="p",
        memory_gib=4,
        examples_per_second=10,
        watts=5,
        uplink_mbps=1,
        downlink_mbps=1,
    )
    files = FileStorage(storage) if isinstance(storage, Path) else storage
    return Device(
        name=name,
        report=report,
        store=Store(files),
        pictures=lambda: pictures,
        sites=SITES,
        policy=policy or Policy(delta=PRIVACY.delta),
        noise=lambda _round, _purpose: noise or SecureNoise(),
        seed=7,
        resolution=64,
        check_memory=check_memory,
    )


def adapter(rank: int, seed: int = 0) -> Adapter:
    """Return an adapter whose product isn't zero, with a norm that a device accepts."""

    def numbered(b: Tensor) -> Tensor:
        numbers = torch.arange(b.numel(), dtype=torch.float32).view_as(b)
        return numbers / numbers.norm().clamp_min(10.0)

    return {name: Factors(a, numbered(b)) for name, (a, b) in init_adapter(SITES, rank, seed).items()}


def cache_epsilon(max_rounds: int) -> None:
    """Compute the cost of up to `max_rounds` rounds of `train_request`, so that child processes find it cached."""
    plan = train_request().plan
    event = PoissonGaussian(
        noise_multiplier=PRIVACY.noise_multiplier, sampling_rate=PRIVACY.sampling_rate, steps=plan.steps
    )
    for rounds in range(1, max_rounds + 1):
        epsilon([event] * rounds, PRIVACY.delta)


def to_bytes(sent: Adapter) -> bytes:
    return tensor_codec.encode(to_tensors(sent))


def from_bytes(data: bytes, rank: int) -> dict[str, torch.Tensor]:
    return tensor_codec.decode(data, adapter_shapes(SITES, rank))


def train_request(*, number: int = 1, rank: int = 2, private: bool = True, sent: bytes | None = None) -> Train:
    plan = TrainingPlan(
        run="run",
        round=number,
        base=BASE,
        rank=rank,
        steps=5,
        batch_size=4,
        learning_rate=1e-3,
        privacy=PRIVACY if private else None,
    )
    return Train(plan=plan, adapter=to_bytes(adapter(3)) if sent is None else sent)


class Performer:
    """Performs jobs immediately and records them; each training has a different result, as with secure noise."""

    def __init__(self) -> None:
        self.jobs: list[jobs.Job] = []

    def __call__(self, batch: list[jobs.Job]) -> Sequence[Result | Exception]:
        self.jobs += batch
        return [self._perform(job) for job in batch]

    def _perform(self, job: jobs.Job) -> Result:
        match job:
            case jobs.EncodeJob():
                means = [float(picture.pixels.mean()) for picture in job.pictures]
                return Examples(
                    torch.tensor(means)[:, None, None, None].expand(-1, 4, 2, 2), torch.zeros(len(means), 3, 2)
                )
            case jobs.MeasureJob():
                return 0.5 if job.adapter else 0.75
            case jobs.MeasureEachJob():
                losses = job.examples.latents[:, 0, 0, 0].double() / 1000
                return losses / 2 if job.adapter else losses
            case jobs.GenerateJob():
                return GeneratedImages(np.full((len(job.captions), 4, 6, 3), job.steps, np.uint8))
            case jobs.TrainJob():
                drawn = SecureNoise().rounded_gaussian(1, 2.0**30) / 2.0**30
                return TrainedAdapter(
                    {name: Factors(f.a + drawn, f.b + drawn) for name, f in job.start.items()}, 0.25, job.steps
                )
