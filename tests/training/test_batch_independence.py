"""An entry's gradient doesn't depend on its company: bit for bit, on the real glyph base and under chaotic adapters.

The adapter's attention is near the norm that a device accepts, where the last bits of a forward pass grow to all of its
gradient: any difference in how a sum was taken shows. It was found by random search (`chaos`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base.base import Base, load
from models.lora.adapter import Adapter, Factors, init_adapter
from models.lora.norm_bound import norm_violation
from privacy.noise import CPU
from privacy.sensitivity import RESOLUTION
from training import cohort, parallel_passes
from training.batches import StepBatch
from training.buffers import BufferSpec, CohortBuffers
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainJob
from training.microbatching import EntryQueue
from training.optimizer import SGD
from training.step import gradients, on_device
from typefaces import dataset

RANK, PLENTY, CLIP = 8, 2**33, 0.01
FOUND = (601139390, 4, 99.0, 99.0)
"""Seed, rank and norms of attention: with passes of any size a sixteenth picture moves the sum by several clips."""

cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def chaos(base: Base, seed: int, rank: int, queries: float, others: float) -> Adapter:
    """A random adapter whose products have these Frobenius norms at queries and keys, and elsewhere."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, factors in init_adapter(base.sites, RANK, seed).items():
        a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
        a[:rank] = torch.randn(rank, a.shape[1], generator=generator)
        b[:, :rank] = torch.randn(b.shape[0], rank, generator=generator)
        norm = queries if ("to_q" in name or "to_k" in name) else others
        scale = (norm / (b @ a).norm()).sqrt()
        found[name] = Factors(a * scale, b * scale)
    assert not norm_violation(found)
    return found


class Joining:
    """No noise, and these pictures in every batch."""

    release = False

    def __init__(self, places: Sequence[int]) -> None:
        self._places = torch.tensor(places, dtype=torch.long)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return self._places

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return torch.zeros(size, dtype=torch.int64, device=device)


@pytest.fixture(scope="module", params=["cpu", cuda])
def glyphs(request: pytest.FixtureRequest) -> Base:
    return load("glyphs", device=request.param)


@pytest.fixture(scope="module")
def letters(glyphs: Base) -> Examples:
    writer = dataset.load("development")[0]
    order = writer.order[:20]
    latents = glyphs.encode_images([writer.images[place] for place in order])
    return Examples(latents.cpu(), glyphs.encode_captions([dataset.caption(dataset.GLYPHS[p]) for p in order]).cpu())


def plan(start: Adapter, letters: Examples, places: Sequence[int], client: str = "d", **changes: object) -> TrainJob:
    """One step of SGD on these pictures of twenty, with the sum as it is: sixteen are assumed."""
    chosen = torch.tensor(places, dtype=torch.long)
    privacy = DPSGD(noise_multiplier=1.0, clip=CLIP, sampling_rate=1.0)
    usual = TrainJob(
        client=client,
        round=1,
        purpose="shared",
        seed=7,
        start=start,
        steps=1,
        batch_size=16,
        learning_rate=16.0,
        examples=Examples(letters.latents[chosen], letters.context[chosen]),
        optimizer="sgd",
        privacy=privacy,
        noise=Joining(range(len(places))),
        names=tuple(f"picture {place}" for place in places),
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def entries(base: Base, job: TrainJob, batch: StepBatch, size: int) -> Tensor:
    """Gradients [n, D] of a batch, in passes of one size."""
    rows, queue, found = CohortBuffers(base, BufferSpec.of([job]), 1), EntryQueue(), []
    rows.load({0: job})
    queue.push(0, batch)
    while len(queue):
        pack = queue.pop(size)
        whole, _ = gradients(base, rows, on_device(pack.padded(size), base.device))
        assert len(whole) == size
        found.append(whole[: pack.size].cpu().clone())
    return torch.cat(found)


def batch_of(places: Sequence[int]) -> StepBatch:
    """Each picture with streams of its own, wherever it stands."""
    drawn = np.random.default_rng(3)
    keys, phases, index = drawn.integers(2**60, size=20), drawn.random(20), np.array(places)
    return StepBatch(index, phases[index], keys[index], np.ones(len(index)), 1)


@pytest.mark.parametrize("size", [5, 16])
def test_neither_place_nor_neighbors_change_a_bit(glyphs: Base, letters: Examples, size: int) -> None:
    """Of a picture alone in its pass, among others at any place, and among copies of itself."""
    job = plan(chaos(glyphs, *FOUND), letters, range(20))
    alone = {place: entries(glyphs, job, batch_of([place]), size)[0] for place in range(6)}
    for order in ([*range(6), 7, 8], [9, 5, 4, 3, 2, 11, 12, 1, 0], [0] * size, [13] * (size - 1) + [2]):
        for place, gradient in zip(order, entries(glyphs, job, batch_of(order), size), strict=True):
            assert place not in alone or torch.equal(gradient, alone[place])


def test_a_pass_of_another_size_changes_the_gradient(glyphs: Base, letters: Examples) -> None:
    """What the size is fixed for: under this adapter the last bits are the whole."""
    job = plan(chaos(glyphs, *FOUND), letters, range(20))
    few, many = (entries(glyphs, job, batch_of([3]), size)[0] for size in (2, 16))
    assert (few - many).norm() > 0.5 * few.norm()


def sums(base: Base, jobs: Sequence[TrainJob]) -> list[Tensor]:
    """Of each job of one step, in the jobs' order: what its noise is to hide [D], in whole steps of the grid."""
    told: dict[int, Tensor] = {}
    really = SGD.step

    def step(self: SGD, rows: Sequence[int], found: Tensor) -> None:
        steps = (found.double().cpu() * (16 * RESOLUTION / CLIP)).round()  # float32 holds as many digits
        told.update(dict(zip(rows, steps, strict=True)))
        really(self, rows, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGD, "step", step)
        outcomes = train(base, jobs, memory=PLENTY, timesteps=1)
    assert not any(isinstance(outcome, Exception) for outcome in outcomes)
    return [told[row] for row in range(len(jobs))]


def test_one_picture_more_moves_the_sum_by_its_own_alone(
    glyphs: Base, letters: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifteen pictures and sixteen, where kernels change: with passes as large as batches this was 4.6 clips."""
    monkeypatch.setattr(cohort, "fixed_pass_size", lambda *_: 16)
    start = chaos(glyphs, *FOUND)
    few, many, alone = (sums(glyphs, [plan(start, letters, p)])[0] for p in (range(15), range(16), [15]))
    assert torch.equal(many - few, alone)
    assert 0.999 * RESOLUTION < alone.norm() <= RESOLUTION  # the grid takes the rest


@pytest.mark.parametrize(("size", "draws"), [(6, 1), (2, 3)], ids=["whole", "in pieces"])
def test_threads_and_other_clients_change_nothing(
    glyphs: Base, letters: Examples, size: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shares the passes, in whatever order, side by side or not."""
    privacy = DPSGD(noise_multiplier=1.0, clip=CLIP, sampling_rate=1.0, draws=draws)
    monkeypatch.setattr(cohort, "fixed_pass_size", lambda *_: size)

    def jobs() -> list[TrainJob]:
        pictures = {"a": range(4), "b": [9, 8, 7], "c": range(4, 9), "nobody": []}
        start = chaos(glyphs, *FOUND)
        return [plan(start, letters, places, client, privacy=privacy) for client, places in pictures.items()]

    monkeypatch.setattr(parallel_passes, "_cores", lambda: 1)
    alone = [sums(glyphs, [job])[0] for job in jobs()]
    assert [bool(total.any()) for total in alone] == [True, True, True, False]
    with ThreadPoolExecutor(2) as pool:
        for cores, order in ((1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (2, [2, 3, 1, 0])):
            monkeypatch.setattr(parallel_passes, "_cores", lambda cores=cores: cores)
            monkeypatch.setattr(parallel_passes, "_pool", lambda: pool)
            together = sums(glyphs, [jobs()[place] for place in order])
            for place, total in zip(order, together, strict=True):
                assert torch.equal(total, alone[place])
