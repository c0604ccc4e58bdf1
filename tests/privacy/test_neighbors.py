"""Sensitivity of a device's releases: removing one picture changes every sum by at most the clip, in every mode.

The larger data set is the smaller one plus one picture, which joins a batch by itself, with all others, or not at all.
Planted mistakes exceed the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench.lib.tiny import ATTENTION
from client.data import Pictures
from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.base.base import Base
from models.lora.adapter import concatenate, to_tensors
from privacy import noised_gain
from privacy.dp_sgd import BoundedSums
from protocol import tensor_codec
from protocol.messages import Evaluate, Evaluation, EvaluationPrivacy
from tests.helpers.devices import PRIVACY
from tests.helpers.neighbors import (
    DIVISOR,
    PLENTY,
    STEPS,
    DeviceOutputs,
    NoNoise,
    TrainingMode,
    adapter,
    device_with_base,
    distances,
    personalize_request,
    random_picture,
    two_rounds,
)
from tests.helpers.reference_trainer import examples, memory_for, private
from tests.helpers.samples import sampled
from training.batches import BatchSampler, EntryQueue, Microbatch, StepBatch
from training.engine import perform
from training.jobs import Examples, Prior, TrainJob

pytestmark = pytest.mark.integration

PICTURES = [random_picture(seed) for seed in range(4)]
ALL_PICTURES = list(range(len(PICTURES)))
EXACT, ROUNDED = 1e-9, 2e-5  # tolerance in float64, and in a device's float32
CUT = 1e-4  # maximum loss by clipping and truncation


@pytest.fixture(scope="module")
def fine(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION, compute="fp64")


def clip_per_site(job: TrainJob, _device: Device) -> TrainJob:
    assert job.privacy
    return dataclasses.replace(job, privacy=dataclasses.replace(job.privacy, per_site=True))


def mirrored_views(job: TrainJob, _device: Device) -> TrainJob:
    """Return each picture and its mirror image."""
    latents, context = job.examples
    both = torch.stack([latents, latents.flip(-1)], dim=1).flatten(0, 1)
    return dataclasses.replace(job, examples=Examples(both, context.repeat_interleave(2, 0)), views=2)


def with_prior(job: TrainJob, _device: Device) -> TrainJob:
    latents, context = job.examples
    pool = Examples(latents.new_zeros(2, *latents.shape[1:]), context.new_ones(2, *context.shape[1:]))
    return dataclasses.replace(job, prior=Prior(examples=pool, weight=0.5))


def all_options(job: TrainJob, device: Device) -> TrainJob:
    return with_prior(mirrored_views(clip_per_site(job, device), device), device)


MODES = {
    "clipped": TrainingMode(),
    "some clipped": TrainingMode(clip=0.05),
    "nothing clipped": TrainingMode(clip=1.0),
    "frozen ranks": TrainingMode(rank=2),
    "three draws, some clipped": TrainingMode(draws=3, clip=0.03),
    "per site": TrainingMode(change=clip_per_site),
    "views": TrainingMode(change=mirrored_views, draws=3),
    "prior": TrainingMode(change=with_prior, draws=2),
    "all options, some clipped": TrainingMode(change=all_options, draws=2, rank=2, clip=0.05),
}
PASSES = {  # with the number of entries per pass
    "two pictures": (2, TrainingMode(clip=0.05)),
    "a piece of a picture": (2, TrainingMode(draws=3, clip=0.03)),
    "a piece with all options": (3, TrainingMode(change=all_options, draws=4, rank=2)),
}
ON_DEVICES = {
    "factors": TrainingMode(),
    "cores": TrainingMode(trains="cores"),
    "cores, frozen ranks, draws": TrainingMode(trains="cores", rank=2, draws=3, clip=0.02),
    "cores per site": TrainingMode(trains="cores", change=clip_per_site),
    "B only": TrainingMode(trains="b"),
    "A only, some sites, frozen ranks": TrainingMode(trains="a", every=2, rank=2, draws=2),
    "personal B, some sites": TrainingMode(trains="split", every=2, clip=0.05),
    "quantized with error feedback": TrainingMode(update="int4", clip=0.02),
}
QUICK = {"clipped", "all options, some clipped", "a piece of a picture", "cores, frozen ranks, draws"}
QUICK |= {"quantized with error feedback", "personal B, some sites"}


def run_neighbors(base: Base, folder: Path, mode: TrainingMode, *, removed: int) -> tuple[DeviceOutputs, DeviceOutputs]:
    """Run the same two rounds with and without one of the pictures."""
    rest = [member for member in ALL_PICTURES if member != removed]
    batches = [[removed], [], ALL_PICTURES, rest]
    result = (
        two_rounds(base, folder / name, PICTURES, members, mode, batches)
        for name, members in (("with", ALL_PICTURES), ("without", rest))
    )
    having, without = result
    return having, without


def check_sensitivity(having: DeviceOutputs, without: DeviceOutputs, clip: float, rounding: float) -> None:
    """Check the sums when the removed picture joins the first and third step of each round."""
    moved = distances(having, without) / clip
    assert moved.shape == (2, STEPS)
    assert (moved <= 1 + rounding).all()
    assert (moved[:, [0, 2]] > 1e-6).all()
    assert (moved[:, [1, 3]] <= rounding).all()
    if clip <= MODES["clipped"].clip:  # the bound is attained
        assert (moved[:, [0, 2]] >= 1 - CUT).all()
    assert all(total.norm() > 0 for sums in without.sums for total in sums[2:])
    assert all(total.norm() == 0 for sums in without.sums for total in sums[:2])  # empty batches
    assert (having.personal - without.personal).norm() > 0.1 * having.personal.norm()
    assert having.replies == without.replies  # the device reports nothing else


@pytest.mark.parametrize("name", sampled(MODES, QUICK))
def test_removing_picture_changes_sums_by_clip_at_most(fine: Base, tmp_path: Path, name: str) -> None:
    removed = list(MODES).index(name) % len(ALL_PICTURES)
    check_sensitivity(*run_neighbors(fine, tmp_path, MODES[name], removed=removed), MODES[name].clip, EXACT)


@pytest.mark.parametrize("name", sampled(PASSES, QUICK))
def test_sensitivity_with_small_passes(fine: Base, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass size follows from the memory, which is the same with and without the picture."""
    entries, mode = PASSES[name]
    more = {"prior": Prior(examples=examples(fine, 2, 5)), "views": 2} if mode.change is all_options else {}
    alike = private(fine, "d", rank=mode.rank, count=len(ALL_PICTURES), draws=mode.draws, **more)
    trains = memory_for(fine, [alike], entries)
    microbatches: list[Microbatch] = []
    really = EntryQueue.pop
    monkeypatch.setattr(
        EntryQueue, "pop", lambda self, size: microbatches.append(really(self, size)) or microbatches[-1]
    )
    mode = dataclasses.replace(mode, memory=-(-trains * 4 // 3))  # training gets three quarters
    check_sensitivity(*run_neighbors(fine, tmp_path, mode, removed=1), mode.clip, EXACT)
    assert len(microbatches) > 16  # more than one for each nonempty step, including those of the personal adapters
    assert any(microbatch.piece for microbatch in microbatches) == (name != "two pictures")


@pytest.mark.parametrize("name", sampled(ON_DEVICES, QUICK))
def test_sensitivity_in_device_precision(base: Base, tmp_path: Path, name: str) -> None:
    check_sensitivity(*run_neighbors(base, tmp_path, ON_DEVICES[name], removed=2), ON_DEVICES[name].clip, ROUNDED)


def relative_sensitivity(having: DeviceOutputs, without: DeviceOutputs, mode: TrainingMode) -> float:
    """Compute the maximum distance of two sums, relative to the claimed bound."""
    return float(distances(having, without).max()) / mode.clip


def freeze_personal_adapter(job: TrainJob, device: Device) -> TrainJob:
    """Apply the frozen personal adapter when training the shared one. The first round has none yet."""
    kept = device.store.personal(device.sites)
    return job if kept is None else dataclasses.replace(job, frozen=concatenate([job.frozen or {}, kept.adapter]))


def key_streams_by_position(job: TrainJob, _device: Device) -> TrainJob:
    """Name pictures by position instead of content."""
    return dataclasses.replace(job, names=tuple(map(str, range(job.pictures))))


@pytest.mark.parametrize("change", [freeze_personal_adapter, key_streams_by_position])
def test_leaking_forward_pass_exceeds_the_bound(
    fine: Base, tmp_path: Path, change: Callable[[TrainJob, Device], TrainJob]
) -> None:
    mode = TrainingMode(change=change)
    having, without = run_neighbors(fine, tmp_path, mode, removed=1)
    assert relative_sensitivity(having, without, mode) > 1.3
    assert distances(having, without)[1, 3] > 0.5 * mode.clip  # a step that the picture did not join


def patch_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[StepBatch], StepBatch]) -> list[int]:
    """Change every batch; record the number of units of each."""
    sizes: list[int] = []
    really = BatchSampler.next

    def next_(self: BatchSampler) -> StepBatch:
        batch = really(self)
        sizes.append(batch.size // batch.per_unit)
        return change(batch)

    monkeypatch.setattr(BatchSampler, "next", next_)
    return sizes


def test_data_dependent_divisor_exceeds_the_bound(fine: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = patch_batches(monkeypatch, lambda batch: batch)
    really = BoundedSums.pop_noised
    monkeypatch.setattr(
        BoundedSums, "pop_noised", lambda self, *given: really(self, *given) * DIVISOR / max(1, sizes[-1])
    )
    having, without = run_neighbors(fine, tmp_path, TrainingMode(), removed=1)
    assert relative_sensitivity(having, without, TrainingMode()) > 1.5


def one_among_copies(base: Base, folder: Path) -> tuple[DeviceOutputs, DeviceOutputs, TrainingMode]:
    """Nine copies of one picture with and without another picture, with a ninth of the copies' gradient norm as the
    clip.
    """
    whole, first = [*9 * [PICTURES[0]], PICTURES[1]], [range(10), [], [], []]
    alone = two_rounds(base, folder / "alone", whole, [0], TrainingMode(clip=1.0), first)
    mode = TrainingMode(clip=float(alone.sums[0][0].norm()) / 9)
    having, without = (
        two_rounds(base, folder / name, whole, range(count), mode, first)
        for name, count in (("with", 10), ("without", 9))
    )
    return having, without, mode


def test_one_picture_among_copies_of_another(fine: Base, tmp_path: Path) -> None:
    """The gradients are equal, so that any change of weights adds up."""
    having, without, mode = one_among_copies(fine, tmp_path)
    assert relative_sensitivity(having, without, mode) == pytest.approx(1, abs=CUT)


def test_mean_loss_exceeds_the_bound(fine: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other picture, each of the nine has a larger weight."""
    patch_batches(
        monkeypatch, lambda batch: batch._replace(weights=batch.weights * batch.per_unit / max(1, batch.size))
    )
    assert relative_sensitivity(*one_among_copies(fine, tmp_path)) > 1.1


def gain_in_steps(base: Base, folder: Path, members: Sequence[int], clip: float, memory: int) -> list[int]:
    """For the adapters of two rounds, the sum that the noise would hide, in steps; a personal adapter is trained in
    between.
    """
    held_pictures = Pictures((random_picture(9),), tuple(PICTURES[member] for member in members), ())
    device = device_with_base(base, folder, "d", held_pictures, lambda _round, _purpose: NoNoise())
    privacy = EvaluationPrivacy(noise_multiplier=20.0, clip=clip, pictures=DIVISOR, delta=PRIVACY.delta)
    first, second = (
        Evaluate(
            run="run", round=number, adapter=tensor_codec.encode(to_tensors(adapter(base, number))), privacy=privacy
        )
        for number in (1, 2)
    )
    result = []
    for request in (first, personalize_request(adapter(base, 1), 1), second):
        conversation = handle(request, device)
        reply = run_handlers({0: conversation}, lambda asked: perform(base, asked, memory=memory, timesteps=2))[0]
        if isinstance(reply, Evaluation):
            assert reply.gain is not None
            result.append(round(reply.gain * DIVISOR / clip * noised_gain.STEPS_PER_CLIP))
    return result


@pytest.mark.parametrize(
    ("clip", "memory"),
    [
        pytest.param(3e-4, PLENTY, id="some clipped"),
        pytest.param(0.01, 2**24, id="little memory", marks=pytest.mark.stress),
    ],
)
def test_removing_picture_changes_gain_by_its_own(base: Base, tmp_path: Path, clip: float, memory: int) -> None:
    """Exactly, in device precision: the sum is counted in whole steps."""
    whole, rest, alone, nobody = (
        gain_in_steps(base, tmp_path / str(members), members, clip, memory) for members in ([0, 1, 2], [1, 2], [0], [])
    )
    assert [a - b for a, b in zip(whole, rest, strict=True)] == alone
    assert all(0 < abs(moved) <= noised_gain.STEPS_PER_CLIP for moved in alone)
    assert nobody == [0, 0]
