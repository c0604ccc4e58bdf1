"""Evaluation of the shared adapter on the devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.serverapp import Grid

from privacy.accounting import PoissonGaussian
from protocol import records
from protocol.messages import DeviceReport, Evaluate, Evaluation
from strategies.central_dp import CentralDP
from strategies.cohort import Cohort
from strategies.download import AdapterFormat
from strategies.round.connected_devices import nodes_by_name
from strategies.round.ledger_coverage import ExplainedEpsilon, cap_epsilon
from strategies.round.messages import received_replies
from strategies.round.metrics import ValidationMetrics
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.round.request import EvaluationRequest, RoundStart
from strategies.round.validation import ReplyValidator, validate_replies
from strategies.selection import NameSelection
from strategies.selection.everyone import Everyone


@dataclass(frozen=True, kw_only=True)
class EvaluationRule:
    """Which devices evaluate the adapter after a round, and how."""

    policy: EvaluationPolicy | None = None
    """Which rounds are evaluated, and with what noise; None: every round without noise, and in a private run none."""
    selection: NameSelection = field(default_factory=Everyone)
    """Selects the devices that evaluate a round."""
    timesteps: int = 3
    """Number of timesteps at which devices evaluate the loss of a picture."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPhase:
    """Request evaluations, and summarize the replies."""

    run: str
    rule: EvaluationRule
    policy: EvaluationPolicy
    format: AdapterFormat
    cohort: Cohort
    validator: ReplyValidator
    explained: ExplainedEpsilon
    central_dp: CentralDP | None

    def request(self, start: RoundStart, grid: Grid) -> EvaluationRequest | None:
        """Request an evaluation of `start.adapter` as that of the round `start.number`.

        Returns:
            The requests; None if this round is not due, or the budget of device-level privacy does not cover it.
        """
        number = start.number
        if not self.policy.is_due(number):
            return None
        download = self.format.encode(start.adapter)
        if not self._charge(number, download.data):
            return None
        reports = self.cohort.query(grid)
        asked = self._select(reports, number)
        message = Evaluate(
            run=self.run,
            round=number,
            adapter=download.data,
            rounded=download.rounded,
            adapted=self.format.adapted,
            timesteps=self.rule.timesteps,
            privacy=self.policy.local_noise,
        )
        return EvaluationRequest(
            number=number,
            messages=dict.fromkeys(asked, message),
            asked=asked,
            max_epsilon=self.explained(number, evaluated=number),
        )

    def finish(self, request: EvaluationRequest, replies: Iterable[Message]) -> ValidationMetrics:
        """Return the mean losses of the base and of the adapter, or a noised gain."""

        def check(report: DeviceReport, reply: Evaluation) -> Evaluation:
            checked = self.validator.evaluation(request.number, report, reply)
            return replace(checked, epsilon=cap_epsilon(checked.epsilon, request.max_epsilon))

        received = received_replies(records.EVALUATE, replies)
        evaluations, dropped = validate_replies(records.EVALUATE, received, request.asked, check)
        accepted = sorted(evaluations.values(), key=lambda reply: reply.device)
        return self.policy.summary(request.number, accepted, dropped)

    def _select(self, reports: Mapping[int, DeviceReport], round: int) -> dict[int, DeviceReport]:
        nodes = nodes_by_name(reports)
        return {nodes[name]: reports[nodes[name]] for name in self.rule.selection.select(nodes, draw=round)}

    def _charge(self, round: int, adapter: bytes) -> bool:
        """Charge for an evaluation with server noise; False if the budget does not cover it.

        Devices charge for an evaluation with their own noise.
        """
        noise = self.policy.central_noise
        if not (self.central_dp and noise):
            return True
        mechanism = PoissonGaussian(noise_multiplier=noise.noise_multiplier, sampling_rate=1.0, steps=1)
        return self.central_dp.charge_evaluation(
            round, adapter, mechanism, clip=noise.clip, expected=float(noise.devices)
        )
