"""Reptile: the shared adapter is trained further, and its difference is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.lora.adapter import Factors, init_adapter
from protocol.messages import PersonalizationMethod, Personalize
from tests.helpers.devices import SITES, Performer, adapter, make_device, to_bytes
from tests.helpers.driven import drive, plain_job
from training.jobs import EarlyStopping, Job, MeasureJob, Result, TrainedAdapter, TrainJob
from training.personalization.reptile import Reptile


def moved(job: Job) -> Result:
    assert isinstance(job, TrainJob)
    return TrainedAdapter({n: Factors(f.a + 1, f.b - 2) for n, f in job.start.items()}, 0.1, job.steps)


def test_sum_with_the_shared_adapter_is_the_trained_copy() -> None:
    shared, on_top = adapter(3), init_adapter(SITES, 3, 2)
    stopping = EarlyStopping(validation=plain_job(on_top).examples, every=1, patience=1)
    job = plain_job(on_top, frozen=shared, early_stopping=stopping)
    result, done = drive(Reptile().fit(job, shared, []), moved)
    assert done == [replace(job, start=shared, frozen=None)]
    for name, (a, b) in shared.items():
        product = b @ a + result[name].b @ result[name].a
        torch.testing.assert_close(product, (b - 2) @ (a + 1))
        assert len(result[name].a) == 6


def test_device_trains_the_rank_of_the_shared_adapter(tmp_path: Path) -> None:
    """Memory is checked for that rank, and the stored pair is the trained copy."""

    class Fits(Performer):
        def _perform(self, job: Job) -> Result:
            if isinstance(job, TrainJob):
                return moved(job)
            return 0.5 if isinstance(job, MeasureJob) else super()._perform(job)

    checked: list[int] = []
    device = make_device(tmp_path, check_memory=lambda rank, *_: checked.append(rank))
    request = Personalize(
        run="run",
        round=1,
        adapter=to_bytes(adapter(3)),
        rank=2,
        steps=10,
        batch_size=4,
        learning_rate=1e-3,
        look_every=5,
        patience=3,
        method=PersonalizationMethod(name="reptile"),
    )
    run_handlers({"d": handle(request, device)}, Fits())
    stored = device.store.personal(SITES)
    assert checked == [3]
    assert stored is not None
    for name, (a, b) in adapter(3).items():
        torch.testing.assert_close(stored.combined[name].b @ stored.combined[name].a, (b - 2) @ (a + 1))
