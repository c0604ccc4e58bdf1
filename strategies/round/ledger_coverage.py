"""Upper bound on the part of a device's reported ε that the plans of this run explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privacy.accounting import PoissonGaussian, epsilon
from protocol.messages import EvaluationPrivacy, TrainingPlan
from strategies.round.private_evaluation import EvaluationPolicy


def explained_epsilon(
    plan: TrainingPlan,
    *,
    rounds: int,
    evaluation: EvaluationPrivacy | None,
    evaluations: int,
    delta: float | None = None,
) -> float | None:
    """Compute ε per picture of a device that took part in all of these rounds and evaluations; None without DP.

    A device's ledger covers every federation of the device and can't be inspected, so the reported number may be false.
    A device must not determine the guarantee of this run, and its participation elsewhere does not belong there. An
    honest device has spent at most this much in this run, since it answers each round only once. The smaller of the two
    values therefore bounds what this run has learned about its pictures, even if the reported one is false.

    Args:
        plan: plan of a round.
        rounds: number of training rounds.
        evaluation: noise of an evaluation; None without it.
        evaluations: number of evaluations.
        delta: δ of the result; None: that of the plan.
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
    if evaluation and evaluations:
        noise = evaluation.noise_multiplier
        events = (*events, PoissonGaussian(noise_multiplier=noise, sampling_rate=1.0, steps=evaluations))
    return epsilon(events, delta or plan.privacy.delta).value


@dataclass(frozen=True, kw_only=True)
class ExplainedEpsilon:
    """`explained_epsilon` of a run, by the numbers of its rounds."""

    plan: TrainingPlan
    policy: EvaluationPolicy

    def __call__(self, rounds: int, *, evaluated: int, delta: float | None = None) -> float | None:
        """Compute ε per picture of the first rounds.

        Args:
            rounds: number of training rounds.
            evaluated: number of rounds after which the adapter was evaluated, if due.
            delta: δ of the result; None: that of the plan.

        Returns:
            ε; None without example-level privacy, or if the plan's δ does not exceed `delta`.
        """
        if self.plan.privacy is None or (delta and self.plan.privacy.delta <= delta):
            return None
        evaluations = sum(self.policy.is_due(number) for number in range(1, evaluated + 1))
        return explained_epsilon(
            self.plan, rounds=rounds, evaluation=self.policy.local_noise, evaluations=evaluations, delta=delta
        )


def cap_epsilon(reported: float | None, limit: float | None) -> float | None:
    """Return the smaller of both values, or the reported one if either is None."""
    return reported if reported is None or limit is None else min(reported, limit)
