"""Cohort training in float32: compared with one client at a time, for any memory, and deterministic."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.base.base import Base
from models.lora.adapter import split_rank
from models.lora.batched_lora import stack_adapters
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    assert_same_bits,
    examples,
    job,
    memory_for,
    nonzero_adapter,
    private,
    trained_adapter,
)
from training.cohort import train
from training.inference import held_out_losses
from training.jobs import EarlyStopping, Prior, TrainedAdapter, TrainJob


@pytest.mark.integration
@pytest.mark.parametrize("entries", [2, 64])
def test_mixed_cohort_matches_reference(base: Base, entries: int) -> None:
    frozen = nonzero_adapter(base, 3, 9)
    jobs = [
        job(base, "plain"),
        job(base, "longer, higher rank", rank=4, steps=6, batch_size=4, learning_rate=3e-3),
        job(base, "on top of a frozen adapter", frozen=frozen),
        job(base, "one picture", count=1),
    ]
    for result, plan in zip(train(base, jobs, memory=memory_for(base, jobs, entries), timesteps=2), jobs, strict=True):
        assert_close(result, Reference(base, plan).train(), plan.start)


@pytest.mark.integration
@pytest.mark.parametrize("entries", [2, 64])
def test_private_cohort_matches_reference(base: Base, entries: int) -> None:
    def jobs() -> list[TrainJob]:  # noise sources are used up, so each side gets new ones
        return [private(base, "a"), private(base, "b", rank=3, steps=5), job(base, "c"), private(base, "d", rate=0.05)]

    for result, plan in zip(
        train(base, jobs(), memory=memory_for(base, jobs(), entries), timesteps=2), jobs(), strict=True
    ):
        assert_close(result, Reference(base, plan).train(), plan.start)


def test_empty_poisson_batch_adds_noise(base: Base) -> None:
    plan = private(base, "nobody", rate=0.0, steps=1, clip=1.0, noise_multiplier=1.0)
    (result,) = train(base, [plan], memory=PLENTY, timesteps=2)
    assert isinstance(result, TrainedAdapter)
    assert result.loss != result.loss  # NaN without examples
    moved = torch.cat([(f.a - plan.start[name].a).flatten() for name, f in result.adapter.items()])
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, plan.learning_rate), rtol=0.1, atol=0)  # Adam's ε


def test_client_is_independent_of_others(base: Base) -> None:
    single = train(base, [job(base, "a")], memory=PLENTY, timesteps=2)[0]
    together = train(base, [job(base, "b"), job(base, "a"), job(base, "c", rank=4)], memory=PLENTY, timesteps=2)[1]
    assert_close(together, trained_adapter(single), job(base, "a").start)


@pytest.mark.integration
def test_training_is_deterministic(base: Base) -> None:
    one, two = (train(base, [job(base, "a"), private(base, "b")], memory=PLENTY, timesteps=2) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert_same_bits(first, second)


@pytest.mark.integration
def test_early_stopping_keeps_the_best_adapter(base: Base) -> None:
    """Compared with runs of each length that was evaluated."""
    validation, every = examples(base, 4, 77), 2
    stopping = EarlyStopping(validation=validation, every=every, patience=2)
    plan = job(base, "a", learning_rate=3e-2, steps=9)
    looks = [*range(0, plan.steps, every), plan.steps]
    lengths = [train(base, [dataclasses.replace(plan, steps=n)], memory=PLENTY, timesteps=2)[0] for n in looks]
    losses = []
    for result in lengths:
        stacks = stack_adapters(base.sites, [trained_adapter(result)])
        losses += held_out_losses(base, [validation], [stacks], timesteps=2, memory=PLENTY)
    best, stop = 0, len(looks) - 1
    for look, loss in enumerate(losses):
        best = look if loss < losses[best] else best
        if look - best >= stopping.patience:
            stop = look
            break
    (found,) = train(base, [dataclasses.replace(plan, early_stopping=stopping)], memory=PLENTY, timesteps=2)
    assert isinstance(found, TrainedAdapter)
    assert found.steps == looks[stop]
    assert found.validation_losses == pytest.approx(losses[: stop + 1])
    assert_same_bits(found, lengths[best])


@pytest.mark.integration
def test_early_stopping_with_other_jobs(base: Base) -> None:
    """Each job is evaluated on its own examples at its own steps."""
    looks = [
        EarlyStopping(validation=examples(base, count, 70 + count), every=every, patience=1)
        for count, every in ((2, 1), (3, 2))
    ]
    jobs = [job(base, "a", early_stopping=looks[0]), job(base, "b"), job(base, "c", rank=3, early_stopping=looks[1])]
    together = train(base, jobs, memory=memory_for(base, jobs, 4), timesteps=2)
    for result, plan in zip(together, jobs, strict=True):
        (single,) = train(base, [plan], memory=PLENTY, timesteps=2)
        assert isinstance(result, TrainedAdapter)
        assert isinstance(single, TrainedAdapter)
        assert result.steps == single.steps
        assert_close(result, single.adapter, plan.start)


@pytest.mark.integration
@pytest.mark.parametrize("entries", [2, 40])
def test_losses_and_steps_are_returned(fine: Base, entries: int) -> None:
    """The loss is the mean over all entries of all steps, each at its current adapter."""

    def jobs() -> list[TrainJob]:
        prior = Prior(examples=examples(fine, 2, 5), weight=0.5)
        return [job(fine, "a"), private(fine, "b", draws=3, steps=2), job(fine, "c", steps=2, prior=prior)]

    for result, plan in zip(
        train(fine, jobs(), memory=memory_for(fine, jobs(), entries), timesteps=2), jobs(), strict=True
    ):
        reference = Reference(fine, plan)
        reference.train()
        assert isinstance(result, TrainedAdapter)
        assert result.steps == plan.steps
        assert result.loss == pytest.approx(float(torch.cat(reference.all_losses).mean()), rel=1e-10)


def test_early_stopping_is_rejected_for_private_jobs(base: Base) -> None:
    with pytest.raises(ValueError, match="private job"):
        private(base, "a", early_stopping=EarlyStopping(validation=examples(base, 1, 0), every=1, patience=1))


def test_no_jobs(base: Base) -> None:
    assert train(base, [], memory=PLENTY, timesteps=2) == []
    assert held_out_losses(base, [], [], timesteps=2, memory=PLENTY) == []


def test_frozen_directions_stay(base: Base) -> None:
    head, tail = split_rank(nonzero_adapter(base, 4, 5), 2)
    plan = job(base, "a", start=head, frozen=tail)
    (result,) = train(base, [plan], memory=PLENTY, timesteps=2)
    assert_close(result, Reference(base, plan).train(), head)
