"""How much of what a device tells of its ledger a run's own plans explain."""

from __future__ import annotations

from collections.abc import Sequence

from privacy.accounting import PoissonGaussian, epsilon
from protocol.messages import EvaluationPrivacy, TrainingPlan


def explained(
    plan: TrainingPlan, *, rounds: int, measuring: EvaluationPrivacy | None, measured: int, delta: float | None = None
) -> float | None:
    """ε per picture of a device that trained in all of these rounds, and measured so often; None without DP.

    A ledger is of every federation that its device is in, and nobody can look into it: a device may tell any number.
    What is promised of this run must not be its to set, nor does what it did elsewhere belong there. No honest one has
    spent more here than whoever took part in everything, since each answers for a round only once, so that the lesser
    of the two bounds what this run has learned of its pictures, however it came to its number.

    Args:
        delta: None for the plan's.
    """
    events: Sequence[PoissonGaussian] = ()
    if plan.privacy is None:
        return None
    if rounds:
        events = (
            PoissonGaussian(
                noise_multiplier=plan.privacy.noise_multiplier,
                sampling_rate=plan.privacy.sampling_rate,
                steps=plan.steps * rounds,
            ),
        )
    if measuring and measured:
        noise = measuring.noise_multiplier
        events = (*events, PoissonGaussian(noise_multiplier=noise, sampling_rate=1.0, steps=measured))
    return epsilon(events, delta or plan.privacy.delta).value


def clipped(told: float | None, most: float | None) -> float | None:
    """The lesser of the two, where there are both."""
    return told if told is None or most is None else min(told, most)
