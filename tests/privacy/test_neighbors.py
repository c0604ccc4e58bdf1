"""One picture more or less moves every sum by the clip at most, in every mode; and what would break it is seen to.

The larger data set is the smaller one and one more picture, which joins batches alone, with all others and not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from bench.lib.tiny import ATTENTION
from client.data import Pictures
from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.base.base import Base
from models.lora.adapter import concatenate, to_tensors
from privacy import bounded_sum
from privacy.clipping import BoundedGradientSums
from protocol import tensor_codec
from protocol.messages import Evaluate, Evaluation, EvaluationPrivacy
from tests.helpers.devices import PRIVACY
from tests.helpers.neighbors import (
    DIVISOR,
    PLENTY,
    STEPS,
    Mode,
    Seen,
    Still,
    adapter,
    device_on,
    distances,
    personalise,
    picture,
    two_rounds,
)
from tests.helpers.reference_trainer import examples, private, room
from training.batches import BatchSampler, StepBatch
from training.engine import perform
from training.jobs import Examples, Prior, TrainJob
from training.microbatching import EntryQueue, Microbatch

PICTURES = [picture(seed) for seed in range(4)]
EVERYBODY = list(range(len(PICTURES)))
EXACT, ROUNDED = 1e-9, 2e-5  # in float64, and in the float32 of devices
CUT = 1e-4  # what the clip and the grid take at most


@pytest.fixture(scope="module")
def fine(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION, compute="fp64")


def per_site(job: TrainJob, _device: Device) -> TrainJob:
    assert job.privacy
    return dataclasses.replace(job, privacy=dataclasses.replace(job.privacy, per_site=True))


def views(job: TrainJob, _device: Device) -> TrainJob:
    """Each picture, and its mirror image."""
    latents, context = job.examples
    both = torch.stack([latents, latents.flip(-1)], dim=1).flatten(0, 1)
    return dataclasses.replace(job, examples=Examples(both, context.repeat_interleave(2, 0)), views=2)


def prior(job: TrainJob, _device: Device) -> TrainJob:
    latents, context = job.examples
    pool = Examples(latents.new_zeros(2, *latents.shape[1:]), context.new_ones(2, *context.shape[1:]))
    return dataclasses.replace(job, prior=Prior(examples=pool, weight=0.5))


def all_of_them(job: TrainJob, device: Device) -> TrainJob:
    return prior(views(per_site(job, device), device), device)


MODES = {
    "clipped": Mode(),
    "some clipped": Mode(clip=0.05),
    "nothing clipped": Mode(clip=1.0),
    "ranks frozen beside": Mode(rank=2),
    "three draws, some clipped": Mode(draws=3, clip=0.03),
    "per site": Mode(change=per_site),
    "views": Mode(change=views, draws=3),
    "prior": Mode(change=prior, draws=2),
    "all of them, some clipped": Mode(change=all_of_them, draws=2, rank=2, clip=0.05),
}
PASSES = {  # with the entries that fit in one
    "two pictures": (2, Mode(clip=0.05)),
    "a piece of a picture": (2, Mode(draws=3, clip=0.03)),
    "a piece of one with everything else": (3, Mode(change=all_of_them, draws=4, rank=2)),
}
ON_DEVICES = {
    "factors": Mode(),
    "cores": Mode(trains="cores"),
    "cores, frozen beside, draws": Mode(trains="cores", rank=2, draws=3, clip=0.02),
    "cores per site": Mode(trains="cores", change=per_site),
    "B alone": Mode(trains="b"),
    "A alone, some sites, frozen beside": Mode(trains="a", every=2, rank=2, draws=2),
    "a B of its own, some sites": Mode(trains="split", every=2, clip=0.05),
    "rounded, the rest carried over": Mode(update="int4", clip=0.02),
}
QUICK = {"clipped", "all of them, some clipped", "a piece of a picture", "cores, frozen beside, draws"}
QUICK |= {"rounded, the rest carried over", "a B of its own, some sites"}


def some_slow(names: Iterable[str]) -> list[ParameterSet]:
    """A sample of the modes in the normal suite, and the others marked slow."""
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def neighbours(base: Base, folder: Path, mode: Mode, *, removed: int) -> tuple[Seen, Seen]:
    """The same two rounds with and without one of the pictures."""
    rest = [member for member in EVERYBODY if member != removed]
    batches = [[removed], [], EVERYBODY, rest]
    found = (
        two_rounds(base, folder / name, PICTURES, members, mode, batches)
        for name, members in (("with", EVERYBODY), ("without", rest))
    )
    having, without = found
    return having, without


def check(having: Seen, without: Seen, clip: float, rounding: float) -> None:
    """Of a picture that joined the first and third step of each round."""
    moved = distances(having, without) / clip
    assert moved.shape == (2, STEPS)
    assert (moved <= 1 + rounding).all()
    assert (moved[:, [0, 2]] > 1e-6).all()
    assert (moved[:, [1, 3]] <= rounding).all()
    if clip <= MODES["clipped"].clip:  # the bound is reached
        assert (moved[:, [0, 2]] >= 1 - CUT).all()
    assert all(total.norm() > 0 for sums in without.sums for total in sums[2:])
    assert all(total.norm() == 0 for sums in without.sums for total in sums[:2])  # empty batches
    assert (having.personal - without.personal).norm() > 0.1 * having.personal.norm()
    assert having.replies == without.replies  # nothing else is told


@pytest.mark.parametrize("name", some_slow(MODES))
def test_one_picture_moves_each_sum_by_the_clip_at_most(fine: Base, tmp_path: Path, name: str) -> None:
    """All modes: python -m pytest -m "slow or not slow" tests/privacy/test_neighbors.py"""
    removed = list(MODES).index(name) % len(EVERYBODY)
    check(*neighbours(fine, tmp_path, MODES[name], removed=removed), MODES[name].clip, EXACT)


@pytest.mark.parametrize("name", some_slow(PASSES))
def test_however_small_passes_are(fine: Base, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits in a pass follows from the memory, of which a device has as much with a picture as without it."""
    entries, mode = PASSES[name]
    more = {"prior": Prior(examples=examples(fine, 2, 5)), "views": 2} if mode.change is all_of_them else {}
    alike = private(fine, "d", rank=mode.rank, count=len(EVERYBODY), draws=mode.draws, **more)
    trains = room(fine, [alike], entries)
    packs: list[Microbatch] = []
    really = EntryQueue.pop
    monkeypatch.setattr(EntryQueue, "pop", lambda self, size: packs.append(really(self, size)) or packs[-1])
    mode = dataclasses.replace(mode, memory=-(-trains * 4 // 3))  # training gets three quarters
    check(*neighbours(fine, tmp_path, mode, removed=1), mode.clip, EXACT)
    assert len(packs) > 16  # which is one for each step that is not empty, those of the personal adapters too
    assert any(pack.piece for pack in packs) == (name != "two pictures")


@pytest.mark.parametrize("name", some_slow(ON_DEVICES))
def test_in_the_precision_of_devices(base: Base, tmp_path: Path, name: str) -> None:
    check(*neighbours(base, tmp_path, ON_DEVICES[name], removed=2), ON_DEVICES[name].clip, ROUNDED)


def exceeded(having: Seen, without: Seen, mode: Mode) -> float:
    """The largest difference of two sums, in units of the bound that is claimed."""
    return float(distances(having, without).max()) / mode.clip


def with_the_personal_adapter(job: TrainJob, device: Device) -> TrainJob:
    """In the forward of the shared one, frozen: the first round has none yet."""
    kept = device.store.personal(device.sites)
    return job if kept is None else dataclasses.replace(job, frozen=concatenate([job.frozen or {}, kept.adapter]))


def streams_by_place(job: TrainJob, _device: Device) -> TrainJob:
    """Names that say where a picture stands, not what it shows."""
    return dataclasses.replace(job, names=tuple(map(str, range(job.pictures))))


@pytest.mark.parametrize("change", [with_the_personal_adapter, streams_by_place])
def test_a_forward_that_knows_other_pictures_breaks_the_bound(
    fine: Base, tmp_path: Path, change: Callable[[TrainJob, Device], TrainJob]
) -> None:
    mode = Mode(change=change)
    having, without = neighbours(fine, tmp_path, mode, removed=1)
    assert exceeded(having, without, mode) > 1.3
    assert distances(having, without)[1, 3] > 0.5 * mode.clip  # where the picture had not even joined


def patched_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[StepBatch], StepBatch]) -> list[int]:
    """Have every batch changed; how many units each had."""
    sizes: list[int] = []
    really = BatchSampler.next

    def next_(self: BatchSampler) -> StepBatch:
        batch = really(self)
        sizes.append(batch.size // batch.per_unit)
        return change(batch)

    monkeypatch.setattr(BatchSampler, "next", next_)
    return sizes


def test_a_divisor_that_counts_the_batch_breaks_the_bound(
    fine: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = patched_batches(monkeypatch, lambda batch: batch)
    really = BoundedGradientSums.pop_noised
    monkeypatch.setattr(
        BoundedGradientSums, "pop_noised", lambda self, *given: really(self, *given) * DIVISOR / max(1, sizes[-1])
    )
    having, without = neighbours(fine, tmp_path, Mode(), removed=1)
    assert exceeded(having, without, Mode()) > 1.5


def one_beside_copies(base: Base, folder: Path) -> tuple[Seen, Seen, Mode]:
    """Nine pictures that are one with and without another, at a ninth of their gradient's length as the clip."""
    whole, first = [*9 * [PICTURES[0]], PICTURES[1]], [range(10), [], [], []]
    alone = two_rounds(base, folder / "alone", whole, [0], Mode(clip=1.0), first)
    mode = Mode(clip=float(alone.sums[0][0].norm()) / 9)
    having, without = (
        two_rounds(base, folder / name, whole, range(count), mode, first)
        for name, count in (("with", 10), ("without", 9))
    )
    return having, without, mode


def test_one_picture_beside_copies_of_another(fine: Base, tmp_path: Path) -> None:
    """Whose gradients are all the same, so that any change of their weights adds up."""
    having, without, mode = one_beside_copies(fine, tmp_path)
    assert exceeded(having, without, mode) == pytest.approx(1, abs=CUT)


def test_a_loss_that_is_the_mean_of_the_batch_breaks_the_bound(
    fine: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the other one each of the nine weighs more."""
    patched_batches(
        monkeypatch, lambda batch: batch._replace(weights=batch.weights * batch.per_unit / max(1, batch.size))
    )
    assert exceeded(*one_beside_copies(fine, tmp_path)) > 1.1


def steps_of_the_gain(base: Base, folder: Path, members: Sequence[int], clip: float, memory: int) -> list[int]:
    """Of the adapters of two rounds, the sum that the noise is to hide in whole steps; a personal one in between."""
    held = Pictures((picture(9),), tuple(PICTURES[member] for member in members), ())
    device = device_on(base, folder, "d", held, lambda _round, _purpose: Still())
    privacy = EvaluationPrivacy(noise_multiplier=20.0, clip=clip, pictures=DIVISOR, delta=PRIVACY.delta)
    first, second = (
        Evaluate(
            run="run", round=number, adapter=tensor_codec.encode(to_tensors(adapter(base, number))), privacy=privacy
        )
        for number in (1, 2)
    )
    found = []
    for request in (first, personalise(adapter(base, 1), 1), second):
        conversation = handle(request, device)
        reply = run_handlers({0: conversation}, lambda asked: perform(base, asked, memory=memory, timesteps=2))[0]
        if isinstance(reply, Evaluation):
            assert reply.gain is not None
            found.append(round(reply.gain * DIVISOR / clip * bounded_sum.STEPS_PER_CLIP))
    return found


@pytest.mark.parametrize(
    ("clip", "memory"),
    [
        pytest.param(3e-4, PLENTY, id="some clipped"),
        pytest.param(0.01, 2**24, id="little memory", marks=pytest.mark.slow),
    ],
)
def test_one_picture_moves_a_gain_by_its_own_alone(base: Base, tmp_path: Path, clip: float, memory: int) -> None:
    """To the last bit, in the precision of devices: the sum is counted in whole steps, and so is what it moves by."""
    whole, rest, alone, nobody = (
        steps_of_the_gain(base, tmp_path / str(members), members, clip, memory)
        for members in ([0, 1, 2], [1, 2], [0], [])
    )
    assert [a - b for a, b in zip(whole, rest, strict=True)] == alone
    assert all(0 < abs(moved) <= bounded_sum.STEPS_PER_CLIP for moved in alone)
    assert nobody == [0, 0]
