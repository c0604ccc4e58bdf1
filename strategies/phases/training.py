"""Training of a round: select devices, send each its plan, validate the replies, and compute the next adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from models.lora.adapter import Adapter, rank
from models.lora.trainable import trained_tensors
from privacy.accounting import STRICT_DELTA
from protocol import records
from protocol.messages import DeviceReport, Train, TrainingPlan, Update
from strategies.aggregation import declared_linearity
from strategies.cohort import Cohort
from strategies.costs import ReportedCosts
from strategies.download import AdapterFormat, Download, quantization_residual
from strategies.robust.replay import ReplayFilter
from strategies.round.connected_devices import nodes_by_name
from strategies.round.ledger_coverage import ExplainedEpsilon, cap_epsilon
from strategies.round.messages import received_replies
from strategies.round.metrics import largest, train_metrics
from strategies.round.request import RoundRequest, RoundResult, RoundStart
from strategies.round.update_spool import update_bytes
from strategies.round.updates import RoundUpdates
from strategies.round.validation import ReplyValidator, validate_replies
from strategies.scaffold import CONTROL, ControlUpdate, initial_control
from strategies.selection import DeviceCandidate
from strategies.server_optimizers import StrategyState
from strategies.server_update import ServerUpdate

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingPhase:
    """Request training, validate the updates, and aggregate them."""

    plan: TrainingPlan
    """Plan of a device without limits."""
    format: AdapterFormat
    update: ServerUpdate
    cohort: Cohort
    validator: ReplyValidator
    explained: ExplainedEpsilon
    costs: ReportedCosts
    replay_filter: ReplayFilter | None
    """Rejects updates that were sent in earlier rounds; None: no check."""
    lr_schedule: Callable[[float, int], float] | None
    """Computes the learning rate of a round; None: that of the plan."""

    def request(
        self,
        start: RoundStart,
        grid: Grid,
        *,
        busy: Collection[int] = (),
        limit: int | None = None,
        plan_number: int | None = None,
        draw: int | None = None,
    ) -> RoundRequest:
        """Select devices, and make a request for each, with its own plan.

        Args:
            start: state before the round.
            grid: connection to the devices.
            busy: nodes that must not be asked.
            limit: maximum number of devices; None: all that are selected.
            plan_number: number that the plans carry; None: the number of the round.
            draw: number of the random stream of the selection; None: the number of the plans.

        Raises:
            AntherError: under device-level privacy, not enough disk space for all updates; nothing is charged.
            BudgetExhausted: the budget of device-level privacy does not cover the round.
        """
        number, central = start.number if plan_number is None else plan_number, self.update.central_dp
        reports = self.cohort.current_reports(grid, busy=busy)
        if central:
            central.resume(start.release)
            allowed = central.eligible([report.device for report in reports.values()])
            reports = {node: report for node, report in reports.items() if report.device in allowed}
        trains = self.update.aggregation.trains(start.number)
        trained, control = self._control(start, trains)
        download = self.format.encode_for_training(start.adapter, control)
        full = replace(self.plan, round=number, rank=min(self.plan.rank, rank(download.adapter)), trains=trains)
        if (steps := self.update.steps(start.number)) is not None:
            full = replace(full, steps=steps)  # at the plan's learning rate: a schedule would end there
        elif self.lr_schedule:
            full = replace(full, learning_rate=self.lr_schedule(full.learning_rate, start.number))
        nodes = nodes_by_name(reports)
        candidates = self.cohort.candidates(
            reports, full, start.history, adapter=download.adapter, download=len(download.data), round=start.number
        )
        selected = self.cohort.select(candidates, draw=number if draw is None else draw, limit=limit)
        plans = {nodes[one.report.device]: (one.report, one.plan) for one in selected if one.ready}
        return RoundRequest(
            updates=self._charge(start.number, selected, full.rank, download.data),
            adapter=download.adapter,
            messages={
                node: Train(
                    plan=plan,
                    adapter=download.data,
                    rounded=download.rounded,
                    adapted=self.format.adapted,
                    echo=start.history.events(report.device),
                )
                for node, (report, plan) in plans.items()
            },
            plans=plans,
            not_contacted=tuple(one.report.device for one in selected if not one.ready),
            bytes_down=len(download.data) * len(plans),
            control_update=ControlUpdate(control, trained, devices=len(candidates)) if control else None,
            residual=self._residual(start.adapter, download),
            sent_at=self.costs.time(grid),
            eligible=frozenset(nodes[name] for name, one in candidates.items() if one.ready),
        )

    def open_updates(self, start: RoundStart, request: RoundRequest | None = None) -> RoundUpdates:
        """Open the updates of a round, before its requests are sent: no reply has to wait until ε is computed.

        Args:
            start: state before the round.
            request: the only request of the round, whose reserved disk space is used; None: there may be several.
        """
        reserved = request.updates if request else None
        updates = RoundUpdates() if reserved is None else reserved
        updates.max_epsilon = self.explained(start.number, evaluated=start.number - 1)
        return updates

    def accept(
        self,
        start: RoundStart,
        request: RoundRequest,
        replies: Iterable[Message],
        updates: RoundUpdates,
        *,
        rebase: Callable[[Adapter], Adapter] = lambda trained: trained,
    ) -> dict[str, int]:
        """Validate replies to a request, and add the accepted ones to the updates of the round.

        Args:
            start: state before the round.
            request: request that they answer.
            replies: replies in the order of arrival.
            updates: updates of the round.
            rebase: converts the adapter that a device trained into the one that is aggregated.

        Returns:
            Number of rejected replies by reason.
        """
        max_bytes = max(map(self.validator.max_payload, {plan for _, plan in request.plans.values()}), default=0)

        def accept(sent: tuple[DeviceReport, TrainingPlan], reply: Update) -> None:
            update, adapter = self.validator.update(request.adapter, sent, reply)
            updates.told = largest([updates.told, update.epsilon])
            update = self.costs.plausible(*sent, update, request.sent_at)
            update = replace(update, epsilon=cap_epsilon(update.epsilon, updates.max_epsilon))
            if self.replay_filter:
                self.replay_filter.check(request.adapter, update.device, adapter, start.memory, updates.sketches)
            updates.add(update, rebase(adapter))

        received = received_replies(records.TRAIN, replies, max_bytes=max_bytes)
        _, dropped = validate_replies(records.TRAIN, received, request.plans, accept)
        return dropped

    def finish(
        self,
        start: RoundStart,
        requests: Sequence[RoundRequest],
        updates: RoundUpdates,
        dropped: Mapping[str, int],
        *,
        current: Adapter | None = None,
    ) -> RoundResult:
        """Aggregate the updates of a round.

        Args:
            start: state before the round.
            requests: requests of the round.
            updates: accepted updates.
            dropped: rejected replies by reason.
            current: adapter that the updates are changes of; None: the one that the only request sent, whose
                quantization residual is added to the result.
        """
        residual: Mapping[str, Tensor] = {}
        if current is None:
            (request,) = requests
            current, residual = request.adapter, request.residual
        after = self.update.apply(
            start, current, updates, residual=residual, format=self.format, with_snr=self.plan.privacy is not None
        )
        plans = {(report.device, plan.round): plan for each in requests for report, plan in each.plans.values()}
        if after.aggregated is None:
            replies = f"{len(updates)} accepted replies of {len(plans)}"
            log.warning("round %d: keeping the adapter: %s", start.number, replies)
        memory = after.memory
        if self.replay_filter:
            memory = self.replay_filter.remember(memory, updates.sketches)
        for request in requests if after.aggregated else ():
            if request.control_update:
                memory = self._updated_control(memory, request.control_update, plans, updates)
        accepted = updates.updates
        if any(request.sent_at is not None for request in requests):
            accepted = self.costs.capped(accepted)
        metrics = train_metrics(
            accepted,
            round=start.number,
            plans=plans,
            not_contacted=[name for request in requests for name in request.not_contacted],
            bytes_down=sum(request.bytes_down for request in requests),
            bytes_up=updates.bytes_up,
            dropped=dropped,
            private=self.plan.privacy,
            spent=start.history.spent,
            told=updates.told,
            strict=self.explained(start.number, evaluated=start.number, delta=STRICT_DELTA),
            central=after.central,
            diagnostics=after.aggregated.diagnostics if after.aggregated else {},
        )
        if (told := updates.told) and told > 1.01 * (explained := metrics.epsilon or told):
            log.info("a device's ledger reports ε=%.3g per picture, this run explains ε=%.3g", told, explained)
        adapter = self.format.as_decoded(after.aggregated.adapter) if after.aggregated else None
        return RoundResult(adapter=adapter, memory=memory, metrics=metrics)

    def _control(self, start: RoundStart, trains: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the trained tensors as sent, and the control variate; both empty without SCAFFOLD."""
        if not self.plan.scaffold:
            return {}, {}
        trained = trained_tensors(start.adapter, trains, self.format.lora_xs_bases)
        return trained, initial_control(start.memory.get(CONTROL), trained)

    def _updated_control(
        self,
        memory: StrategyState,
        control_update: ControlUpdate,
        plans: Mapping[tuple[str, int], TrainingPlan],
        updates: RoundUpdates,
    ) -> StrategyState:
        """Return the strategy state with the server's control variate after these updates."""
        for key, (adapter, _) in zip(updates.adapters.keys, updates.adapters, strict=True):
            control_update.add(plans[key], trained_tensors(adapter, plans[key].trains, self.format.lora_xs_bases))
        return {**memory, CONTROL: control_update.next()}

    def _charge(
        self, round: int, selected: Sequence[DeviceCandidate], rank: int, adapter: bytes
    ) -> RoundUpdates | None:
        """Charge for a round under device-level privacy, and return its updates, for which disk space is reserved.

        Space is reserved for every sampled device, so that a full disk cannot make one device's acceptance depend on
        another's. Including those that can't be asked, so that the size does not reveal them.
        """
        if self.update.central_dp is None:
            return None
        updates = RoundUpdates(len(selected) * update_bytes(self.format.sites, rank))
        self.update.central_dp.charge_round(round, [one.report.device for one in selected], adapter)
        return updates

    def _residual(self, adapter: Adapter, download: Download) -> Mapping[str, Tensor]:
        """Return the quantization residual of a download, if the next adapter can use it."""
        if download.rounded is None or declared_linearity(self.update.aggregation).rotation_reason:
            return {}
        return quantization_residual(adapter, download.adapter)
