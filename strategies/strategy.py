"""The strategy of a run: its phases, as functions of their arguments.

    request = strategy.training.request(start, grid)  # select devices, and make a request for each
    with strategy.training.open_updates(start, request) as updates:
        dropped = strategy.training.accept(start, request, replies, updates)  # validate the replies
        result = strategy.training.finish(start, [request], updates, dropped)  # aggregate

The round loop (`server.rounds`) keeps the state of a run, passes it as a `RoundStart`, and decides which devices are
busy. The strategy itself remembers only the devices that are connected and, under device-level privacy, the round that
is charged for. `strategies.flower_strategy` has the same phases under the names of Flower's `Strategy`.
"""

from __future__ import annotations

import logging

from flwr.serverapp import Grid

from protocol.messages import DeviceReport, TrainingPlan
from strategies.central_dp import CentralDP
from strategies.clock import Clock, WallClock
from strategies.cohort import Cohort, CohortRule
from strategies.costs import ReportedCosts
from strategies.download import AdapterFormat
from strategies.phases.evaluation import EvaluationPhase, EvaluationRule
from strategies.phases.personalization import PersonalizationPhase
from strategies.phases.training import TrainingPhase
from strategies.planning.planner import Planner, Planning
from strategies.reply_checks import ReplyChecks
from strategies.round.ledger_coverage import ExplainedEpsilon
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.round.validation import ReplyValidator
from strategies.selection import amplifies
from strategies.server_update import ServerUpdate
from strategies.validation import check
from strategies.validation.combination import of_parts

log = logging.getLogger(__name__)

_PLANNING, _EVALUATION, _CHECKS = Planning(), EvaluationRule(), ReplyChecks()


class FederatedStrategy:
    """Strategy of a run.

    Args:
        plan: plan of a device without limits. Its `round` is replaced, and the aggregation determines its trained part.
        format: sites of the adapter in the base that `plan` names, and its payloads.
        update: computes the next adapter.
        cohort: chooses the devices that train in a round.
        planning: reduces the plan to the limits of each device.
        evaluation: which devices evaluate which rounds.
        checks: checks of replies beyond their validity.
        clock: clock that determines the age of reports; None: wall time.

    Attributes:
        combination: components and settings that the constructor has checked.
        cohort: devices of the run.
        training, evaluation, personalization: phases.

    Raises:
        CombinationError: arguments contradict each other.
    """

    def __init__(
        self,
        *,
        plan: TrainingPlan,
        format: AdapterFormat,
        update: ServerUpdate,
        cohort: CohortRule,
        planning: Planning = _PLANNING,
        evaluation: EvaluationRule = _EVALUATION,
        checks: ReplyChecks = _CHECKS,
        clock: Clock | None = None,
    ) -> None:
        self.plan, self.format, self.update = plan, format, update
        self.can_redraw = update.central_dp is None and not amplifies(cohort.selection)
        """Whether a round without an available device may be drawn again; not if a sample is charged for."""
        policy = evaluation.policy or EvaluationPolicy(interval=0 if self.private else 1)
        self.combination = of_parts(plan, format, update, cohort, planning, policy, checks)
        check(self.combination)
        costs = ReportedCosts(sites=format.sites, clock=clock or WallClock())
        planner = Planner(
            sites=format.sites,
            limits=planning.limits,
            mixed_ranks=update.aggregation.mixed_ranks,
            method=planning.method,
        )
        self.cohort = Cohort(
            cohort,
            planner,
            run=plan.run,
            base=plan.base,
            clock=costs.clock,
            adapted=format.adapted,
            device_level=update.central_dp is not None,
        )
        validator = ReplyValidator(
            sites=format.sites,
            lora_xs_bases=format.lora_xs_bases,
            accept_simulated=checks.accept_simulated,
            evaluation_policy=policy,
        )
        explained = ExplainedEpsilon(plan=plan, policy=policy)
        self.training = TrainingPhase(
            plan=plan,
            format=format,
            update=update,
            cohort=self.cohort,
            validator=validator,
            explained=explained,
            costs=costs,
            replay_filter=checks.replay_filter,
            lr_schedule=planning.lr_schedule,
        )
        self.evaluation = EvaluationPhase(
            run=plan.run,
            rule=evaluation,
            policy=policy,
            format=format,
            cohort=self.cohort,
            validator=validator,
            explained=explained,
            central_dp=update.central_dp,
        )
        self.personalization = PersonalizationPhase(
            plan=plan,
            format=format,
            timesteps=evaluation.timesteps,
            cohort=self.cohort,
            validator=validator,
            costs=costs,
        )

    @property
    def central_dp(self) -> CentralDP | None:
        """The server's part of device-level privacy; None without it."""
        return self.update.central_dp

    @property
    def private(self) -> bool:
        """Whether the run has a privacy guarantee. Then only noised values may be used, reported or evaluated."""
        return self.plan.privacy is not None or self.update.central_dp is not None

    def query(self, grid: Grid) -> dict[int, DeviceReport]:
        """Return the reports of the connected nodes that have the base of the run (`Cohort.query`)."""
        return self.cohort.query(grid)

    def summary(self) -> None:
        """Log the run in one line."""
        plan = self.plan
        log.info(
            "run %s: %s of rank %d at %d sites, %d steps of %d per round, %s",
            plan.run,
            type(self.update.aggregation).__name__,
            plan.rank,
            len(self.format.sites),
            plan.steps,
            plan.batch_size,
            self._describe_noise(),
        )

    def _describe_noise(self) -> str:
        """Describe the planned noise of the run for the log."""
        parts = [f"σ = {self.plan.privacy.noise_multiplier:.3g} per step on devices"] if self.plan.privacy else []
        if level := self.central_dp:
            budget, z = level.budget, level.mechanism.noise_multiplier
            solved = f"for ε={budget.epsilon:g} per device (δ={budget.delta:g})"
            parts.append(
                f"σ = {z:.3g} per round on the server, {solved}, {level.mechanism.expected:g} devices expected"
            )
        return ", ".join(parts) or "no differential privacy"
