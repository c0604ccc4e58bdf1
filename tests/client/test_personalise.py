"""Which shared adapter a device keeps for itself: its owner's pictures decide, and nobody else ever hears of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from client.device import Device
from client.drive import drive
from client.logic import handle
from conf.errors import AntherError
from models.adapter import Adapter
from protocol.messages import Evaluate, MeasuringPrivacy, Personalise, Request
from tests.client.devices import PICTURES, SITES, Performer, adapter, make_device, to_bytes, train_request
from training import jobs

FIRST, SECOND, THIRD = (adapter(3, seed=seed) for seed in (1, 2, 3))
PRIVATE = MeasuringPrivacy(noise_multiplier=20.0, clip=0.2, pictures=3, delta=1e-3)


class Judging(Performer):
    """Measures the first adapter at 0.5, and every other at `others`."""

    def __init__(self, others: float) -> None:
        super().__init__()
        self._others = others

    def _perform(self, job: jobs.Job) -> jobs.Result:
        if isinstance(job, jobs.Measure) and job.adapter:
            return 0.5 if same(job.adapter, FIRST) else self._others
        return super()._perform(job)


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(a, b) for name in SITES for a, b in zip(one[name], other[name], strict=True))


def sent(shared: Adapter, number: int) -> Personalise:
    return Personalise(
        run="run", round=number, adapter=to_bytes(shared), rank=2, steps=10, batch_size=4, learning_rate=1e-3,
        look_every=5, patience=3,
    )  # fmt: skip


def ask(request: Request, device: Device, perform: Performer) -> Any:
    outcome = drive({"d": handle(request, device)}, perform)["d"]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def kept(device: Device) -> Adapter:
    stored = device.store.personal(SITES)
    assert stored is not None
    return stored.shared


def after_two(folder: Path, others: float) -> Device:
    """A device that was sent the first and then the second adapter."""
    device, perform = make_device(folder), Judging(others)
    ask(sent(FIRST, 1), device, perform)
    ask(sent(SECOND, 2), device, perform)
    return device


@pytest.mark.parametrize(("others", "chosen"), [(0.4, SECOND), (0.5, SECOND), (0.6, FIRST), (math.nan, FIRST)])
def test_a_worse_adapter_does_not_take_the_place_of_a_better(tmp_path: Path, others: float, chosen: Adapter) -> None:
    device = after_two(tmp_path, others)
    assert same(kept(device), chosen)
    perform = Judging(others)
    ask(sent(THIRD, 3), device, perform)
    train = perform.jobs[-1]
    assert isinstance(train, jobs.Train)
    assert train.frozen is not None
    assert same(train.frozen, FIRST if chosen is FIRST else THIRD)


def test_it_is_judged_by_validation_pictures_of_ones_own(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Judging(0.6)
    ask(sent(FIRST, 1), device, perform)
    assert not any(isinstance(job, jobs.Measure) for job in perform.jobs)  # there is nothing to compare it with
    ask(sent(SECOND, 2), device, perform)
    measured = [job for job in perform.jobs if isinstance(job, jobs.Measure)]
    assert [len(job.examples) for job in measured] == [len(PICTURES.validation)] * 2
    blind = make_device(tmp_path / "blind", pictures=PICTURES._replace(validation=()))
    for number, shared in enumerate((FIRST, SECOND), start=1):
        ask(sent(shared, number), blind, Judging(0.6))
    assert same(kept(blind), SECOND)


def test_an_adapter_of_another_base_is_no_rival(tmp_path: Path) -> None:
    device = after_two(tmp_path, 0.6)
    moved = dataclasses.replace(device, report=dataclasses.replace(device.report, base="c" * 64))
    perform = Judging(0.6)
    ask(sent(SECOND, 3), moved, perform)
    assert same(kept(moved), SECOND)
    assert not any(isinstance(job, jobs.Measure) for job in perform.jobs)


def test_the_personal_adapter_goes_on_over_the_shared_one_that_stays(tmp_path: Path) -> None:
    device, perform = after_two(tmp_path, 0.6), Judging(0.6)
    before = device.store.personal(SITES)
    assert before is not None
    ask(sent(THIRD, 3), device, perform)
    train = perform.jobs[-1]
    assert isinstance(train, jobs.Train)
    assert same(train.start, before.adapter)


def test_rolling_back_returns_both(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Judging(0.4)
    with pytest.raises(AntherError, match="no previous adapter"):
        device.store.roll_back()
    ask(sent(FIRST, 1), device, perform)
    ask(dataclasses.replace(sent(FIRST, 2), steps=20), device, perform)  # trained further: still no previous
    before = device.store.personal(SITES)
    with pytest.raises(AntherError, match="no previous adapter"):
        device.store.roll_back()
    ask(sent(SECOND, 3), device, perform)
    assert same(kept(device), SECOND)
    device.store.roll_back()
    found = device.store.personal(SITES)
    assert found is not None
    assert before is not None
    assert same(found.shared, FIRST)
    assert same(found.adapter, before.adapter)
    assert found.request == before.request
    with pytest.raises(AntherError, match="no previous adapter"):
        device.store.roll_back()


def test_the_choice_never_leaves_the_device(tmp_path: Path) -> None:
    """Devices that differ in their choice alone: every later reply and cost is the same, and so is the work."""
    keeps, takes = after_two(tmp_path / "keeps", 0.6), after_two(tmp_path / "takes", 0.4)
    back = after_two(tmp_path / "back", 0.4)
    back.store.roll_back()
    assert same(kept(keeps), FIRST)
    assert same(kept(takes), SECOND)
    evaluate = Evaluate(run="run", round=5, adapter=to_bytes(SECOND), privacy=PRIVATE)
    requests = [
        sent(SECOND, 3), sent(THIRD, 4), train_request(number=5, sent=to_bytes(SECOND)), evaluate,
        train_request(number=6, sent=to_bytes(THIRD)),
    ]  # fmt: skip
    done = []
    for device in (keeps, takes, back):
        seen: list[object] = []
        for request in requests:
            perform = Judging(0.6 if device is keeps else 0.4)
            reply = ask(request, device, perform)
            told = {name: value for name, value in vars(reply).items() if name not in ("adapter", "gain")}
            seen.append((told, [type(job) for job in perform.jobs]))
            shared = [job for job in perform.jobs if isinstance(job, jobs.Train) and job.purpose == "shared"]
            seen += [_numbers(job) for job in shared]
        done.append(seen)
    assert done[0] == done[1] == done[2]


def _numbers(job: jobs.Train) -> list[object]:
    """What a shared update is made of."""
    assert job.frozen is not None
    tensors = [t for part in (job.start, job.frozen) for name in SITES for t in part[name]]
    return [job.steps, job.batch_size, job.names, *(t.tolist() for t in tensors)]


def test_previews_are_of_what_was_learnt_and_stay_on_the_device(tmp_path: Path) -> None:
    device, perform = dataclasses.replace(make_device(tmp_path), previews=1), Performer()
    reply = ask(sent(FIRST, 3), device, perform)
    (drawn,) = (job for job in perform.jobs if isinstance(job, jobs.Draw))
    stored = device.store.personal(SITES)
    assert stored is not None
    assert same(drawn.adapters[0], stored.shared)
    assert same(drawn.adapters[1], stored.adapter)
    assert drawn.captions == [PICTURES.validation[0].caption]
    assert Image.open(tmp_path / "previews" / "round-000003.png").size == (6, 4)
    assert reply == ask(sent(FIRST, 3), make_device(tmp_path / "other"), Performer())  # who asked learns nothing of it


def test_what_cannot_be_drawn_was_learnt_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Blind(Performer):
        def _perform(self, job: jobs.Job) -> jobs.Result:
            if isinstance(job, jobs.Draw):
                raise AntherError("no memory")
            return super()._perform(job)

        def __call__(self, batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
            try:
                return [self._perform(job) for job in batch]
            except AntherError as error:
                return [error]

    device = dataclasses.replace(make_device(tmp_path), previews=2)
    ask(sent(FIRST, 3), device, Blind())
    assert same(kept(device), FIRST)
    assert "no preview of round-000003: no memory" in caplog.text
    assert not (tmp_path / "previews").exists()
