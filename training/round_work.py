"""Work of a training round, from its plan: what servers, devices and simulations compute time and energy from."""

from __future__ import annotations

from functools import cache

from protocol.messages import PersonalizationMethod, TrainingPlan
from training.personalization import Personalization, build
from training.public_schedule import scheduled_examples


def method_of(plan: TrainingPlan) -> Personalization:
    """Return the method of personalization that takes part in a plan's round; without one, the plain training."""
    return Personalization() if plan.personalization is None else _build(plan.personalization)


def method_steps(plan: TrainingPlan) -> int:
    """Return the steps that the method of personalization adds to those of the plan."""
    return method_of(plan).steps_in_round(plan.round)


def steps_per_round(plan: TrainingPlan) -> int:
    """Return the steps that a plan takes on a device, with those of its method of personalization."""
    return plan.steps + method_steps(plan)


def examples_per_round(plan: TrainingPlan) -> int:
    """Return the number of examples that take as long as the round; under DP, its public duration."""
    return scheduled_examples(plan) + method_steps(plan) * plan.batch_size


@cache
def _build(method: PersonalizationMethod) -> Personalization:
    return build(method.name, method.arguments())
