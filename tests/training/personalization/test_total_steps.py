"""Steps of a device, which the arm without a federation gets too, against the jobs that its method yields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from models.lora.adapter import init_adapter
from models.lora.directions import extend, init_directions
from tests.helpers.devices import SITES
from tests.helpers.driven import drive, plain_job
from training.jobs import EncodeJob, Examples, GeneratedImages, GenerateJob, Job, Result, TrainedAdapter, TrainJob
from training.personalization import PERSONALIZATIONS, Personalization, build, steps_by_round, total_steps

ROUNDS, SHARED, PERSONAL = 4, 10, 20
OPTIONS: Mapping[str, Mapping[str, float]] = {
    "directions": {"number": 2.0, "steps": 7.0, "round_steps": 3.0, "warmup": 1.0},
    "fedalt": {"steps": 6.0},
    "lora": {},
    "population": {"number": 2.0, "steps": 7.0, "round_steps": 30.0},
    "prior": {"pictures": 2.0},
    "reptile": {},
}


def answer(job: Job) -> Result:
    """Change nothing; draw black pictures."""
    match job:
        case GenerateJob():
            return GeneratedImages(np.zeros((len(job.captions), 8, 8), np.uint8))
        case EncodeJob():
            return Examples(torch.zeros(len(job.pictures), 1, 1, 1), torch.zeros(len(job.pictures), 1, 1))
    assert isinstance(job, TrainJob)
    return TrainedAdapter(job.start, 0.0, job.steps, coefficients=torch.zeros(2) if job.directions else None)


def batches(jobs: list[Job]) -> int:
    """Count the batches of training; one with prior preservation has a second one of drawn pictures."""
    return sum(job.steps * (2 if job.prior else 1) for job in jobs if isinstance(job, TrainJob))


def in_round(method: Personalization, number: int) -> int:
    start = method.initial(init_adapter(SITES, 2, 0), seed=1)
    last = number == ROUNDS and method.last_round_steps is not None
    job = plain_job(start, round=number, steps=method.last_round_steps if last else SHARED)
    return batches(drive(method.train_round(job, None), answer)[1])


def after(method: Personalization) -> int:
    shared = init_adapter(SITES, 2, 0)
    if hasattr(method, "number"):
        shared = extend(shared, init_directions(shared, method.number, 1, scale=1.0))
    job = plain_job(init_adapter(SITES, 2, 5), frozen=shared, steps=PERSONAL)
    return batches(drive(method.fit(job, shared, ["a", "a", "b"]), answer)[1])


@pytest.mark.parametrize("name", list(PERSONALIZATIONS))
def test_counted_steps_are_those_of_the_jobs(name: str) -> None:
    method = build(name, OPTIONS[name])
    by_round = [in_round(method, number) for number in range(1, ROUNDS + 1)]
    assert steps_by_round(method, rounds=ROUNDS, shared=SHARED) == by_round
    assert method.all_steps_after(PERSONAL) == after(method)
    assert total_steps(method, rounds=ROUNDS, shared=SHARED, personal=PERSONAL) == sum(by_round) + after(method)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", 4 * 10 + 20),
        ("reptile", 4 * 10 + 20),
        ("prior", 4 * 10 + 2 * 20),
        ("fedalt", 4 * (10 + 6) + 20),
        ("directions", 10 + 3 * (10 + 3) + 7 + 20),
        ("population", 3 * 10 + 30 + 7 + 20),
    ],
)
def test_total_steps(name: str, expected: int) -> None:
    method: Any = build(name, OPTIONS[name])
    assert total_steps(method, rounds=ROUNDS, shared=SHARED, personal=PERSONAL) == expected
