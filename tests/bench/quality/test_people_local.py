"""Tests of training without others, against trainings of each length."""

from __future__ import annotations

import dataclasses

import pytest

from bench.quality.people_local import LocalPerson, curve_jobs, curve_points
from bench.quality.people_settings import LocalSettings
from models.base.base import Base
from models.lora.batched_lora import stack_adapters
from tests.helpers.reference_trainer import examples
from training.cohort import train
from training.inference import held_out_losses
from training.jobs import TrainedAdapter

PLENTY = 1 << 30
SETTING = LocalSettings(rank=2, lr=3e-2, batch_size=2, proximal=0.01, prior=0.5, steps=4)


def people(base: Base) -> dict[str, LocalPerson]:
    return {
        name: LocalPerson(*(examples(base, count, seed + part) for part, count in enumerate((3, 2, 4))))
        for name, seed in (("ann", 10), ("bo", 20))
    }


def test_points_of_a_curve() -> None:
    assert curve_points(7, 3) == [0, 3, 6, 7]
    assert curve_points(6, 3) == [0, 3, 6]


@pytest.mark.integration
def test_curve_has_the_losses_of_shorter_trainings(base: Base) -> None:
    persons, prior = people(base), examples(base, 5, 40)
    jobs = curve_jobs(SETTING, persons, base, prior, seed=1, total=7, every=2)
    results = train(base, jobs, memory=PLENTY, timesteps=2)
    assert all(isinstance(result, TrainedAdapter) for result in results)
    for index, person in enumerate(persons.values()):
        curve = results[index].validation_losses
        for point, steps in enumerate(curve_points(7, 2)):
            plain = dataclasses.replace(jobs[index], steps=steps, early_stopping=None)
            (trained,) = train(base, [plain], memory=PLENTY, timesteps=2)
            stacks = stack_adapters(base.sites, [trained.adapter])
            (loss,) = held_out_losses(base, [person.test], [stacks], timesteps=2, memory=PLENTY)
            assert curve[point] == pytest.approx(loss, rel=1e-5), steps
        stacks = stack_adapters(base.sites, [results[2 + index].adapter])
        (stopped,) = held_out_losses(base, [person.test], [stacks], timesteps=2, memory=PLENTY)
        assert stopped == pytest.approx(curve[2], rel=1e-5)


@pytest.mark.integration
def test_validation_letters_end_training(base: Base) -> None:
    """The result is the best adapter on validation letters, not on test letters."""
    persons = people(base)
    setting = dataclasses.replace(SETTING, validated=True, prior=0.0, lr=0.1)
    jobs = curve_jobs(setting, persons, base, None, seed=1, total=8, every=1)
    results = train(base, jobs, memory=PLENTY, timesteps=2)
    for index, person in enumerate(persons.values()):
        ended = results[2 + index]
        stacks = stack_adapters(base.sites, [ended.adapter])
        (validation,) = held_out_losses(base, [person.validation], [stacks], timesteps=2, memory=PLENTY)
        assert validation == pytest.approx(min(ended.validation_losses))
        assert jobs[index].prior is None
