"""An entry's gradient is independent of the other entries: bit for bit, on the glyph base and under chaotic adapters.

The attention of the adapters is near the norm limit of a device, where the last bits of a forward pass are amplified to
the whole gradient: any difference in the order of a sum becomes visible. They were found by random search
(`chaotic_adapter`).
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
from privacy.bounded_sum import RESOLUTION
from privacy.noise import CPU
from training import capacity, passes
from training.batches import EntryQueue, StepBatch
from training.buffers import BufferSpec, CohortBuffers
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainJob
from training.optimizer import SGD
from training.passes import gradients, on_device
from typefaces import dataset

RANK, PLENTY, CLIP = 8, 2**33, 0.01
FOUND = (601139390, 4, 99.0, 99.0)
"""Seed, rank and norms of attention: with passes of any size a sixteenth picture moves the sum by several clips."""

cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def chaotic_adapter(base: Base, seed: int, rank: int, queries: float, others: float) -> Adapter:
    """Create a random adapter whose products have these Frobenius norms at queries and keys, and at other sites."""
    generator, result = torch.Generator().manual_seed(seed), {}
    for name, factors in init_adapter(base.sites, RANK, seed).items():
        a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
        a[:rank] = torch.randn(rank, a.shape[1], generator=generator)
        b[:, :rank] = torch.randn(b.shape[0], rank, generator=generator)
        norm = queries if ("to_q" in name or "to_k" in name) else others
        scale = (norm / (b @ a).norm()).sqrt()
        result[name] = Factors(a * scale, b * scale)
    assert not norm_violation(result)
    return result


class _FixedBatches:
    """Noise source without noise, whose batches are fixed."""

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
    latents = glyphs.encode_images([writer.images[index] for index in order])
    return Examples(latents.cpu(), glyphs.encode_captions([dataset.caption(dataset.GLYPHS[p]) for p in order]).cpu())


def plan(start: Adapter, letters: Examples, places: Sequence[int], client: str = "d", **changes: object) -> TrainJob:
    """Create a plan of one SGD step on some of twenty pictures, whose result is the sum; sixteen pictures are
    assumed."""
    selected = torch.tensor(places, dtype=torch.long)
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
        examples=Examples(letters.latents[selected], letters.context[selected]),
        optimizer="sgd",
        privacy=privacy,
        noise=_FixedBatches(range(len(places))),
        names=tuple(f"picture {index}" for index in places),
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def entry_gradients(base: Base, job: TrainJob, batch: StepBatch, size: int) -> Tensor:
    """Compute the gradients [n, D] of a batch, in passes of one size."""
    rows, queue, result = CohortBuffers(base, BufferSpec.of([job]), 1), EntryQueue(), []
    rows.load({0: job})
    queue.push(0, batch)
    while len(queue):
        microbatch = queue.pop(size)
        whole, _ = gradients(base, rows, on_device(microbatch.padded(size), base.device))
        assert len(whole) == size
        result.append(whole[: microbatch.size].cpu().clone())
    return torch.cat(result)


def batch_of(places: Sequence[int]) -> StepBatch:
    """Create a batch with one entry per picture, whose streams depend on the picture only."""
    drawn = np.random.default_rng(3)
    keys, phases, index = drawn.integers(2**60, size=20), drawn.random(20), np.array(places)
    return StepBatch(index, phases[index], keys[index], np.ones(len(index)), 1)


@pytest.mark.integration
@pytest.mark.parametrize("size", [5, 16])
def test_gradient_is_independent_of_position_and_neighbors(glyphs: Base, letters: Examples, size: int) -> None:
    """For a picture by itself in its pass, among others at any position, and among copies of itself."""
    job = plan(chaotic_adapter(glyphs, *FOUND), letters, range(20))
    single = {index: entry_gradients(glyphs, job, batch_of([index]), size)[0] for index in range(3)}
    for order in ([*range(3), 7, 8], [9, 5, 4, 3, 2, 11, 12, 1, 0], [0] * size, [13] * (size - 1) + [2]):
        for index, gradient in zip(order, entry_gradients(glyphs, job, batch_of(order), size), strict=True):
            assert index not in single or torch.equal(gradient, single[index])


def test_pass_size_changes_the_gradient(glyphs: Base, letters: Examples) -> None:
    """The reason for the fixed size: under this adapter the last bits dominate."""
    job = plan(chaotic_adapter(glyphs, *FOUND), letters, range(20))
    few, many = (entry_gradients(glyphs, job, batch_of([3]), size)[0] for size in (2, 16))
    assert (few - many).norm() > 0.5 * few.norm()


def hidden_sums(base: Base, jobs: Sequence[TrainJob]) -> list[Tensor]:
    """Return the sum [D] of each job of one step that its noise would hide, in whole steps of the grid."""
    recorded: dict[int, Tensor] = {}
    really = SGD.step

    def step(self: SGD, rows: Sequence[int], found: Tensor) -> None:
        steps = (found.double().cpu() * (16 * RESOLUTION / CLIP)).round()  # float32 has enough digits
        recorded.update(dict(zip(rows, steps, strict=True)))
        really(self, rows, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGD, "step", step)
        outcomes = train(base, jobs, memory=PLENTY, timesteps=1)
    assert not any(isinstance(outcome, Exception) for outcome in outcomes)
    return [recorded[row] for row in range(len(jobs))]


def test_added_picture_changes_sum_by_its_own_gradient(
    glyphs: Base, letters: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fifteen and sixteen pictures, where kernels change: if the pass size followed the batch, the change was 4.6
    clips.
    """
    monkeypatch.setattr(capacity, "fixed_pass_size", lambda *_: 16)
    start = chaotic_adapter(glyphs, *FOUND)
    few, many, single = (hidden_sums(glyphs, [plan(start, letters, p)])[0] for p in (range(15), range(16), [15]))
    assert torch.equal(many - few, single)
    assert 0.999 * RESOLUTION < single.norm() <= RESOLUTION  # truncation removes the rest


@pytest.mark.integration
@pytest.mark.parametrize(("size", "draws"), [(6, 1), (2, 3)], ids=["whole", "in pieces"])
def test_gradient_is_independent_of_threads_and_clients(
    glyphs: Base, letters: Examples, size: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any clients in the same passes, in any order, concurrent or not."""
    privacy = DPSGD(noise_multiplier=1.0, clip=CLIP, sampling_rate=1.0, draws=draws)
    monkeypatch.setattr(capacity, "fixed_pass_size", lambda *_: size)

    def jobs() -> list[TrainJob]:
        pictures = {"a": range(2), "b": [9], "c": range(2, 5), "nobody": []}
        start = chaotic_adapter(glyphs, *FOUND)
        return [plan(start, letters, places, client, privacy=privacy) for client, places in pictures.items()]

    monkeypatch.setattr(passes, "_cores", lambda: 1)
    single = [hidden_sums(glyphs, [job])[0] for job in jobs()]
    assert [bool(total.any()) for total in single] == [True, True, True, False]
    with ThreadPoolExecutor(2) as pool:
        for cores, order in ((1, [0, 1, 2, 3]), (2, [2, 3, 1, 0])):
            monkeypatch.setattr(passes, "_cores", lambda cores=cores: cores)
            monkeypatch.setattr(passes, "_pool", lambda: pool)
            together = hidden_sums(glyphs, [jobs()[index] for index in order])
            for index, total in zip(order, together, strict=True):
                assert torch.equal(total, single[index])
