"""Flower Strategy, composed of an aggregation, a selection and a planner.

It has the steps of a round in Flower's terms. `strategies.round.connected_devices` tracks devices, and
`strategies.round.validation` checks their replies.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Sites, adapter_shapes, from_tensors, rank, to_tensors
from models.lora.lora_xs import to_tensors_with_bases
from models.lora.norm_bound import norm_violation
from models.lora.scaffold import to_control_tensors
from models.lora.trainable import from_trained_tensors, trained_layout, trained_tensors
from privacy.accounting import STRICT_DELTA, PoissonGaussian
from privacy.snr import signal_to_spread
from protocol import records
from protocol.messages import (
    DeviceReport,
    Evaluate,
    Evaluation,
    Personalize,
    Personalized,
    QuantizedFormat,
    Query,
    Reply,
    Request,
    Train,
    TrainingPlan,
    Update,
)
from protocol.tensor_codec import decode, encode
from strategies.aggregation import Aggregated, Aggregation, RankAware, Updates, declared_linearity
from strategies.central_dp import CentralDP, changes
from strategies.clock import Clock, WallClock
from strategies.download import FP32, add_residual, encode_download, quantization_residual
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planner
from strategies.planning.site_selection import SiteSelector
from strategies.robust.replay import ReplayFilter
from strategies.round.connected_devices import ConnectedDevices, RegisteredGrid, nodes_by_name
from strategies.round.history import TrainingHistory
from strategies.round.ledger_coverage import cap_epsilon, explained_epsilon
from strategies.round.metrics import (
    CentralDPMetrics,
    DeviceMetrics,
    PersonalizationMetrics,
    TrainMetrics,
    ValidationMetrics,
    largest,
    train_metrics,
)
from strategies.round.plausibility import cap_to_median, plausible_cost
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.round.update_spool import UpdateKey, UpdateSpool, update_bytes
from strategies.round.updates import RoundRequest, RoundUpdates
from strategies.round.validation import ReceivedReply, ReplyValidator, error_rejection, validate_replies
from strategies.scaffold import ControlUpdate, initial_control
from strategies.selection import DeviceCandidate, DeviceCandidates, NameSelection, Selection, uses_transient_state
from strategies.selection.eligible import ALL_DEVICES, Eligibility
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
from strategies.server_optimizers import ServerOptimizer, StrategyState, Tensors
from strategies.validation import check_combination

log = logging.getLogger(__name__)

_CONTROL = "control"  # part of the strategy state; stored, don't change

_QUERY_TIMEOUT = 120.0  # seconds; a device starts a process to reply
_QUERY_WAIT = 5.0  # seconds to wait for the reports of new devices, which may also arrive later
_QUERY_STALE = 30.0  # seconds to wait for the current state of connected devices, if it matters


class FederatedStrategy(Strategy):
    """Strategy of a run.

    Args:
        plan: plan of a device without limits. Its `round` is replaced, and the aggregation determines its trained part.
        sites: sites of the adapter in the base that `plan` names.
        aggregation: rule that computes the next adapter.
        selection: selects the devices that train in a round.
        limits: limits that plans are reduced to.
        evaluation_selection: selects the devices that evaluate the adapter after a round (default: all).
        evaluation_policy: which rounds are evaluated, and with what noise (default: every round without noise; in a
            private run, none).
        server_optimizer: converts a round's mean into a step; None: the mean is the next adapter.
        download: precision of adapters that are sent.
        lora_xs_bases: fixed factors, for an aggregation of the cores between them.
        lr_schedule: computes the learning rate of a round from the plan's rate and the round's number (default:
            constant).
        accept_simulated: also accept private updates with reproducible noise, which are no releases; for tests and
            simulations only.
        central_dp: clips and noises updates on the server; None: updates are aggregated as they are.
        replay_filter: rejects updates that were sent in earlier rounds; None: no check.
        quorum: number of accepted replies without which a round keeps the adapter.
        eligibility: requirements for training. Under device-level privacy, ineligible devices are still sampled and
            charged, but not contacted and not replaced: replacing them would leak their state into the selection of
            this and later rounds.
        site_selector: selects the sites that each device trains; None: all of them.
        clock: clock that determines the age of reports.
        max_state_age: seconds after which a report is requested again, if anything uses transient device state.
        adapted: names of the sites, if they differ from those that the base's family adapts; None: they don't.
        timesteps: timesteps at which devices evaluate the loss of a picture.

    Attributes:
        state: strategy state after the last round; it is set when a run is resumed.
        trained: metrics of the last training, after it.
        validation: metrics of the last evaluation, after it.
        personalized: metrics of the last personalization, after it.
        accepted: number of updates accepted so far in the current round.
        eligible_nodes: nodes that could be asked in the last round.
        busy_nodes: nodes that must not be asked to train.
        max_new: maximum number of devices to ask; None: all that are selected.
    """

    def __init__(
        self,
        *,
        plan: TrainingPlan,
        sites: Sites,
        aggregation: Aggregation,
        selection: Selection,
        limits: PlanLimits,
        evaluation_selection: NameSelection | None = None,
        evaluation_policy: EvaluationPolicy | None = None,
        server_optimizer: ServerOptimizer | None = None,
        download: str = FP32,
        lora_xs_bases: Adapter | None = None,
        lr_schedule: Callable[[float, int], float] | None = None,
        accept_simulated: bool = False,
        central_dp: CentralDP | None = None,
        replay_filter: ReplayFilter | None = None,
        quorum: int = 1,
        eligibility: Eligibility = ALL_DEVICES,
        site_selector: SiteSelector | None = None,
        clock: Clock | None = None,
        max_state_age: float = math.inf,
        adapted: tuple[str, ...] | None = None,
        timesteps: int = 3,
    ) -> None:
        evaluation_policy = evaluation_policy or EvaluationPolicy(interval=0 if plan.privacy or central_dp else 1)
        check_combination(
            plan=plan,
            aggregation=aggregation,
            selection=selection,
            limits=limits,
            evaluation_policy=evaluation_policy,
            server_optimizer=server_optimizer,
            download=download,
            lora_xs_bases=lora_xs_bases,
            central_dp=central_dp,
            replay_filter=replay_filter,
            quorum=quorum,
            site_selector=site_selector,
        )
        self.sites, self.lora_xs_bases, self.central_dp = sites, lora_xs_bases, central_dp
        self._plan, self._limits, self._lr_schedule = plan, limits, lr_schedule
        self._adapted, self._timesteps = adapted, timesteps
        self._aggregation, self._selection = aggregation, selection
        self._evaluation_selection = evaluation_selection or Everyone()
        self._evaluation_policy = evaluation_policy
        self._server_optimizer, self._download, self._replay_filter = server_optimizer, download, replay_filter
        self.state: StrategyState = {}
        self._validator = ReplyValidator(
            sites=sites,
            lora_xs_bases=lora_xs_bases,
            accept_simulated=accept_simulated,
            evaluation_policy=evaluation_policy,
        )
        self._devices = ConnectedDevices(plan.base)
        self._eligibility = eligibility
        self._planner = Planner(
            sites=sites, limits=limits, mixed_ranks=aggregation.mixed_ranks, site_selector=site_selector
        )
        self._clock, self._max_state_age = clock or WallClock(), max_state_age
        self._history = TrainingHistory()
        self._request: RoundRequest | None = None
        self._reserved: RoundUpdates | None = None  # with disk space for a round that is charged for
        self._asked: dict[int, DeviceReport] = {}
        self._personal: tuple[TrainingPlan, float | None] = plan, None
        self._evaluating = False
        self.quorum = quorum
        self.accepted = 0
        self._max_epsilon: float | None = None  # ε per picture that the rounds up to the last request explain
        self.eligible_nodes: set[int] = set()
        self.busy_nodes: set[int] = set()
        self.max_new: int | None = None
        self.trained: TrainMetrics | None = None
        self.validation: ValidationMetrics | None = None
        self.personalized: PersonalizationMetrics | None = None

    @property
    def private(self) -> bool:
        """Whether the run has a privacy guarantee. Then only noised values may be used, reported or evaluated."""
        return self._plan.privacy is not None or self.central_dp is not None

    @property
    def can_redraw(self) -> bool:
        """Whether a round without an available device may be drawn again; not if a sample is charged for."""
        return self.central_dp is None and not isinstance(self._selection, Poisson)

    def is_evaluated(self, round: int) -> bool:
        """Whether devices evaluate the adapter of this round."""
        return self._evaluation_policy.is_due(round)

    def restore_history(self, devices: Mapping[str, DeviceMetrics], rounds: Iterable[TrainMetrics | None] = ()) -> None:
        """Restore the devices and rounds of a resumed run.

        The number of ledger entries is echoed to each device, and selections use the rest.
        """
        self._history.restore(devices, rounds)

    def summary(self) -> None:
        plan = self._plan
        log.info(
            "run %s: %s of rank %d at %d sites, %d steps of %d per round, %s",
            plan.run,
            type(self._aggregation).__name__,
            plan.rank,
            len(self.sites),
            plan.steps,
            plan.batch_size,
            self._describe_noise(),
        )

    def query(self, grid: Grid) -> dict[int, DeviceReport]:
        """Return the reports of connected nodes with the base of the run; only nodes without a report are queried.

        Under device-level privacy, devices with a stale report that do not reply keep it: otherwise other devices would
        be sampled.
        """
        if nodes := self._devices.nodes_to_query(set(grid.get_node_ids()), now=self._clock.now()):
            messages = [self._message(Query(adapted=self._adapted), node) for node in nodes]
            names: Mapping[int, str] = {}
            if isinstance(grid, RegisteredGrid):
                names = grid.names()
                wait = _QUERY_STALE if self._devices.stale else _QUERY_WAIT
                replies = grid.query_nodes(messages, timeout=_QUERY_TIMEOUT, wait=wait)
            else:
                replies = iter(grid.send_and_receive(messages, timeout=_QUERY_TIMEOUT))
            received = _received(records.QUERY, replies)
            answered, _ = validate_replies(records.QUERY, received, dict.fromkeys(nodes), lambda _, reply: reply)
            for node, report in sorted(answered.items()):
                self._devices.update_report(node, report, now=self._clock.now(), registered=names.get(node))
        reports, stale = self._devices.reports, () if self.central_dp else self._devices.stale
        return {node: report for node, report in reports.items() if node not in stale}

    def _current_reports(self, grid: Grid) -> dict[int, DeviceReport]:
        """Query like `query`, including reports that are too old if transient device state is used."""
        if (
            self._eligibility.uses_transient_state
            or self._limits.uses_transient_state
            or uses_transient_state(self._selection)
        ):
            self._devices.mark_stale(before=self._clock.now() - self._max_state_age, exclude=self.busy_nodes)
        return self.query(grid)

    def _candidates(
        self, reports: Mapping[int, DeviceReport], full: TrainingPlan, adapter: Adapter, download: int, round: int
    ) -> DeviceCandidates:
        """Return the devices with a feasible plan, and the plan that each would get.

        Under device-level privacy, other devices are included, with the plan of a device without limits.

        Args:
            reports: reports by node.
            full: plan of a device without limits.
            adapter: adapter that is sent.
            download: its bytes.
            round: number of the round.
        """
        plans = self._planner.plans(reports.values(), full, adapter=adapter, download=download)
        candidates = {}
        for node, report in reports.items():
            feasible = plans.get(report.device)
            planned = (
                self._planner.at_every_site(report, full, download=download)
                if self.central_dp and not feasible
                else feasible
            )
            if planned:
                candidates[report.device] = DeviceCandidate(
                    report=report,
                    plan=planned.plan,
                    seconds=planned.seconds,
                    joules=planned.joules,
                    ready=feasible is not None and node not in self._devices.stale and self._eligibility(report),
                    metrics=self._history.devices.get(report.device),
                )
        return DeviceCandidates(candidates, self._history.losses, round=round)

    def _select(self, candidates: DeviceCandidates, draw: int) -> list[DeviceCandidate]:
        """Select at most `max_new` devices to train.

        Under device-level privacy these may include devices that can't be asked: replacing them, now or later, would
        leak their state.
        """
        ready = {name: one for name, one in candidates.items() if one.ready}
        available = DeviceCandidates(ready, candidates.losses, round=candidates.round)
        selected = self._selection.select(candidates if self.central_dp else available, draw=draw)
        if self.max_new is not None and len(selected) > self.max_new:
            # "room" seeds the subsample; don't change.
            selected = sorted(random.Random(derive_seed(self._plan.run, draw, "room")).sample(selected, self.max_new))
        return [candidates[name] for name in selected]

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface; settings are in the messages
        grid: Grid,
        *,
        number: int | None = None,
        draw: int | None = None,
    ) -> Iterable[Message]:
        """Make a Train message for each selected device, with its own plan.

        Args:
            server_round: number of the round.
            arrays: current adapter.
            config: unused.
            grid: connection to the devices.
            number: number that the plans carry; None: the number of the round.
            draw: number of the random stream of the selection; None: the number of the plans.

        Raises:
            AntherError: under device-level privacy, not enough disk space for all updates; nothing is charged.
        """
        number = server_round if number is None else number
        reports = {node: report for node, report in self._current_reports(grid).items() if node not in self.busy_nodes}
        if self.central_dp:
            allowed = self.central_dp.eligible([report.device for report in reports.values()])
            reports = {node: report for node, report in reports.items() if report.device in allowed}
        current = from_tensors(decode(records.adapter_from_record(arrays), adapter_shapes(self.sites, -1)))
        data, adapter, rounded = encode_download(current, self._download)
        trains = self._aggregation.trains(server_round)
        start: Tensors = {}
        control: Tensors = {}
        if self._plan.scaffold:
            start = trained_tensors(adapter, trains, self.lora_xs_bases)
            control = initial_control(self.state.get(_CONTROL), start)
        if self.lora_xs_bases or control:  # such tensors are sent in full precision, together with the adapter
            tensors = to_tensors_with_bases(adapter, self.lora_xs_bases) if self.lora_xs_bases else to_tensors(adapter)
            data = encode(tensors | to_control_tensors(control))
        full = replace(self._plan, round=number, rank=min(self._plan.rank, rank(adapter)), trains=trains)
        if self._lr_schedule:
            full = replace(full, learning_rate=self._lr_schedule(full.learning_rate, server_round))
        nodes, candidates = nodes_by_name(reports), self._candidates(reports, full, adapter, len(data), server_round)
        self.eligible_nodes = {nodes[name] for name, one in candidates.items() if one.ready}
        selected = self._select(candidates, number if draw is None else draw)
        plans = {nodes[one.report.device]: (one.report, one.plan) for one in selected if one.ready}
        self.accepted = 0
        if self.central_dp:
            # Reserve disk space for every sampled device, so that a full disk cannot make one device's acceptance
            # depend on another's. Including those that can't be asked, so that the size does not reveal them.
            self._reserved = RoundUpdates(len(selected) * update_bytes(self.sites, full.rank))
            self.central_dp.charge_round(server_round, [one.report.device for one in selected], data)
        # Computed before any reply arrives, so that no reply has to wait for it.
        self._max_epsilon = self._explained(server_round, evaluated=server_round - 1)
        self._request = RoundRequest(
            adapter=adapter,
            plans=plans,
            not_contacted=tuple(one.report.device for one in selected if not one.ready),
            bytes_down=len(data) * len(plans),
            control_update=ControlUpdate(control, start, devices=len(candidates)) if control else None,
            residual=(
                {}
                if rounded is None or declared_linearity(self._aggregation).rotation_reason
                else quantization_residual(current, adapter)
            ),
            sent_at=self._time(grid),
        )
        return [
            self._message(
                Train(
                    plan=plan,
                    adapter=data,
                    rounded=rounded,
                    adapted=self._adapted,
                    echo=self._history.events(report.device),
                ),
                node,
            )
            for node, (report, plan) in plans.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies of a round.

        Returns:
            The next adapter and its metrics, or None for both if no reply was accepted. Under device-level privacy, a
            noised adapter is released in any case, unless devices would refuse it (None for both).
        """
        request, reserved = self.take_request(), self._reserved
        self._reserved = None
        with RoundUpdates() if reserved is None else reserved as updates:
            dropped = self.accept_replies(request, replies, updates)
            arrays = self.finish_round(
                server_round, request.adapter, [request], updates, dropped, residual=request.residual
            )
        return arrays, None if arrays is None else MetricRecord({"replied": len(updates), **self._diagnostics()})

    def take_request(self) -> RoundRequest:
        """Return the request of the last `configure_train`, once: a round must not be aggregated twice."""
        if self._request is None:
            raise ValueError("configure_train must be called before aggregate_train, once per round")
        request, self._request = self._request, None
        return request

    def accept_replies(
        self,
        request: RoundRequest,
        replies: Iterable[Message],
        updates: RoundUpdates,
        *,
        rebase: Callable[[Adapter], Adapter] = lambda trained: trained,
    ) -> dict[str, int]:
        """Validate replies to a request, and add the accepted ones to the updates of the round.

        Args:
            request: request that they answer.
            replies: replies in the order of arrival.
            updates: updates of the round.
            rebase: converts the adapter that a device trained into the one that is aggregated.

        Returns:
            Number of rejected replies by reason.
        """
        max_bytes = max((self._validator.max_payload(plan) for _, plan in request.plans.values()), default=0)

        def accept(sent: tuple[DeviceReport, TrainingPlan], reply: Update) -> None:
            update, adapter = self._validator.update(request.adapter, sent, reply)
            updates.told = largest([updates.told, update.epsilon])
            seconds, joules = self._plausible_cost(*sent, update, request.sent_at)
            epsilon = cap_epsilon(update.epsilon, self._max_epsilon)
            update = replace(update, epsilon=epsilon, seconds=seconds, joules=joules)
            if self._replay_filter:
                self._replay_filter.check(request.adapter, update.device, adapter, self.state, updates.sketches)
            updates.add(update, rebase(adapter))
            self.accepted += 1

        received = _received(records.TRAIN, replies, max_bytes=max_bytes)
        _, dropped = validate_replies(records.TRAIN, received, request.plans, accept)
        return dropped

    def finish_round(
        self,
        server_round: int,
        current: Adapter,
        requests: Sequence[RoundRequest],
        updates: RoundUpdates,
        dropped: Mapping[str, int],
        *,
        residual: Mapping[str, Tensor] | None = None,
    ) -> ArrayRecord | None:
        """Aggregate the updates of a round, and set `trained`.

        Args:
            server_round: number of the round.
            current: adapter that the round started from.
            requests: requests of the round.
            updates: accepted updates.
            dropped: rejected replies by reason.
            residual: quantization residual of `current`, which is added to the result.

        Returns:
            The next adapter; None to keep the current one.
        """
        ranks = {update.rank for update in updates.updates}
        aggregated, central = self._aggregate(current, updates.adapters, ranks, server_round, residual or {})
        if self._replay_filter:
            self.state = self._replay_filter.remember(self.state, updates.sketches)
        plans = {(report.device, plan.round): plan for each in requests for report, plan in each.plans.values()}
        if aggregated is None:
            replies = f"{len(updates)} accepted replies of {len(plans)}"
            log.warning("round %d: keeping the adapter: %s", server_round, replies)
        for request in requests if aggregated else ():
            if request.control_update:
                self._update_control(request.control_update, plans, updates.adapters)
        accepted = updates.updates
        if any(request.sent_at is not None for request in requests):
            seconds = cap_to_median([update.seconds for update in accepted])
            joules = cap_to_median([update.joules for update in accepted])
            accepted = [
                replace(update, seconds=s, joules=j) for update, s, j in zip(accepted, seconds, joules, strict=True)
            ]
        self.trained = train_metrics(
            accepted,
            round=server_round,
            plans=plans,
            not_contacted=[name for request in requests for name in request.not_contacted],
            bytes_down=sum(request.bytes_down for request in requests),
            bytes_up=updates.bytes_up,
            dropped=dropped,
            private=self._plan.privacy,
            spent=self._history.spent,
            told=updates.told,
            strict=self._explained(server_round, evaluated=server_round, delta=STRICT_DELTA),
            central=central,
            diagnostics=aggregated.diagnostics if aggregated else {},
        )
        if (told := updates.told) and told > 1.01 * (explained := self.trained.epsilon or told):
            log.info("a device's ledger reports ε=%.3g per picture, this run explains ε=%.3g", told, explained)
        self._history.add_round(self.trained)
        return records.adapter_to_record(encode(to_tensors(aggregated.adapter))) if aggregated else None

    def _time(self, grid: Grid) -> float | None:
        """Return the current time if devices use the same clock as this server, otherwise None."""
        return self._clock.now() if isinstance(grid, RegisteredGrid) else None

    def _plausible_cost(
        self, report: DeviceReport, plan: TrainingPlan, reply: Update | Personalized, sent_at: float | None
    ) -> tuple[float, float]:
        """Return the accepted seconds and joules of a reply.

        Args:
            report: report of the device.
            plan: its plan.
            reply: its reply.
            sent_at: time of the request; None if devices use another clock.
        """
        elapsed = None if sent_at is None else self._clock.now() - sent_at
        return plausible_cost(report, plan, (reply.seconds, reply.joules), sites=self.sites, elapsed=elapsed)

    def _explained(self, rounds: int, *, evaluated: int, delta: float | None = None) -> float | None:
        """Compute ε per picture of this many training rounds, and of the evaluations after this many rounds.

        None without example-level privacy, or if the plan's δ does not exceed `delta`.
        """
        if self._plan.privacy is None or (delta and self._plan.privacy.delta <= delta):
            return None
        policy = self._evaluation_policy
        evaluations = sum(policy.is_due(number) for number in range(1, evaluated + 1))
        return explained_epsilon(
            self._plan, rounds=rounds, evaluation=policy.local_noise, evaluations=evaluations, delta=delta
        )

    def _diagnostics(self) -> dict[str, float]:
        return self.trained.diagnostics if self.trained else {}

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface; settings are in the messages
        grid: Grid,
    ) -> Iterable[Message]:
        """Make an Evaluate message for each selected device; none if this round is not evaluated.

        Args:
            server_round: number of the round.
            arrays: adapter to evaluate.
            config: unused.
            grid: grid that reaches the devices.
        """
        data, rounded = self._encode_download(records.adapter_from_record(arrays))
        self._evaluating = self.is_evaluated(server_round) and self._charge_evaluation(server_round, data)
        self._asked = self._select_evaluation(self.query(grid), server_round) if self._evaluating else {}
        private = self._evaluation_policy.local_noise
        if self._asked and private:
            self._max_epsilon = self._explained(server_round, evaluated=server_round)
        return self._messages(
            Evaluate(
                run=self._plan.run,
                round=server_round,
                adapter=data,
                rounded=rounded,
                adapted=self._adapted,
                timesteps=self._timesteps,
                privacy=private,
            )
        )

    def _encode_download(self, data: bytes) -> tuple[bytes, QuantizedFormat | None]:
        """Encode a full-precision payload in the precision of downloads."""
        if self._download == FP32:
            return data, None
        encoded, _, rounded = encode_download(
            from_tensors(decode(data, adapter_shapes(self.sites, -1))), self._download
        )
        return encoded, rounded

    def _select_evaluation(self, reports: Mapping[int, DeviceReport], round: int) -> dict[int, DeviceReport]:
        """Select the devices that evaluate a round."""
        nodes = nodes_by_name(reports)
        return {nodes[name]: reports[nodes[name]] for name in self._evaluation_selection.select(nodes, draw=round)}

    def _charge_evaluation(self, round: int, adapter: bytes) -> bool:
        """Charge for an evaluation with server noise; False if the budget does not cover it.

        Devices charge for an evaluation with their own noise.
        """
        noise = self._evaluation_policy.central_noise
        if not (self.central_dp and noise):
            return True
        mechanism = PoissonGaussian(noise_multiplier=noise.noise_multiplier, sampling_rate=1.0, steps=1)
        return self.central_dp.charge_evaluation(
            round, adapter, mechanism, clip=noise.clip, expected=float(noise.devices)
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean losses of the base and of the adapter, or a noised gain; None if there is neither."""

        def check(report: DeviceReport, reply: Evaluation) -> Evaluation:
            checked = self._validator.evaluation(server_round, report, reply)
            return replace(checked, epsilon=cap_epsilon(checked.epsilon, self._max_epsilon))

        received = _received(records.EVALUATE, replies)
        evaluations, dropped = validate_replies(records.EVALUATE, received, self._asked, check)
        validation = ValidationMetrics(base=None, shared=None, dropped=dropped)
        if self._evaluating:
            accepted = sorted(evaluations.values(), key=lambda reply: reply.device)
            validation = self._evaluation_policy.summary(server_round, accepted, dropped)
        self.validation = validation
        self._history.spent = largest([self._history.spent, validation.epsilon])
        values = {name: getattr(validation, name) for name in ("base", "shared", "gain", "gain_error")}
        available = {name: value for name, value in values.items() if value is not None}
        return MetricRecord(available) if available else None

    def configure_personalize(
        self, request: Personalize, grid: Grid, names: Collection[str] | None = None
    ) -> Iterable[Message]:
        """Make a Personalize message for every connected device, or those among them in `names`.

        Args:
            request: message to send; its adapter is encoded for download.
            grid: grid that reaches the devices.
            names: names of devices; None: all.

        Returns:
            The messages, one per device.
        """
        data, rounded = self._encode_download(request.adapter)
        request = replace(request, adapter=data, rounded=rounded, adapted=self._adapted, timesteps=self._timesteps)
        self._asked = self.query(grid)
        if names is not None:
            self._asked = {node: report for node, report in self._asked.items() if report.device in names}
        plan = replace(self._plan, rank=request.rank, steps=request.steps, batch_size=request.batch_size, privacy=None)
        self._personal = plan, self._time(grid)
        return self._messages(request)

    def aggregate_personalize(self, replies: Iterable[Message]) -> PersonalizationMetrics:
        """Return the devices with a personal adapter, and the cost."""
        plan, sent_at = self._personal

        def check(report: DeviceReport, reply: Personalized) -> Personalized:
            checked = self._validator.personalized(report, reply)
            seconds, joules = self._plausible_cost(report, plan, checked, sent_at)
            return replace(checked, seconds=seconds, joules=joules)

        received = _received(records.PERSONALIZE, replies)
        accepted, dropped = validate_replies(records.PERSONALIZE, received, self._asked, check)
        done = sorted(accepted.values(), key=lambda reply: reply.device)
        costs = [reply.seconds for reply in done], [reply.joules for reply in done]
        seconds, joules = costs if sent_at is None else map(cap_to_median, costs)
        self.personalized = PersonalizationMetrics(
            asked=len(self._asked),
            devices=tuple(reply.device for reply in done),
            dropped=dropped,
            seconds=max(seconds, default=0.0),
            joules=sum(joules),
        )
        return self.personalized

    def _aggregate(
        self, current: Adapter, updates: Updates, ranks: Collection[int], round: int, residual: Mapping[str, Tensor]
    ) -> tuple[Aggregated | None, CentralDPMetrics | None]:
        """Compute the next adapter, and the metrics of the server's noise.

        Args:
            current: adapter that the round started from.
            updates: accepted updates.
            ranks: ranks that devices trained.
            round: number of the round.
            residual: quantization residual of `current`.

        Returns:
            The adapter, None to keep the current one; metrics, None without server noise.
        """
        central = None
        if self.central_dp:
            trained = (adapter for adapter, _ in updates)
            mean, central = self.central_dp.privatize(self._aggregation, current, trained, round=round)
        elif len(updates) < self.quorum:
            return None, None
        else:
            rule = (
                self._aggregation.with_ranks(ranks) if isinstance(self._aggregation, RankAware) else self._aggregation
            )
            mean = rule.aggregate(current, updates, round=round)
        aggregated, state = self._take_step(current, mean, residual, round)
        # Each update was valid, and a private release does not depend on it: the aggregate may still exceed the bound.
        if violation := norm_violation(aggregated.adapter):
            log.warning("round %d: keeping the adapter, since devices would refuse the next: %s", round, violation)
            return None, central
        self.state = state
        if central:
            return aggregated, central
        # Rebased updates of older adapters may be stacked factors of a larger rank, without a comparable change.
        if self._plan.privacy is None or any(rank(adapter) > rank(current) for adapter, _ in updates):
            return aggregated, None
        layout = trained_layout(
            self.sites, rank(current), self._aggregation.trains(round), self.lora_xs_bases or current
        )
        snr = signal_to_spread(changes(layout, current, (adapter for adapter, _ in updates)))
        return aggregated._replace(diagnostics=aggregated.diagnostics | ({} if snr is None else {"snr": snr})), None

    def _take_step(
        self, current: Adapter, aggregated: Aggregated, residual: Mapping[str, Tensor], round: int
    ) -> tuple[Aggregated, StrategyState]:
        """Apply the server optimizer and add the quantization residual.

        Args:
            current: adapter that the round started from, as decoded by devices.
            aggregated: result of the aggregation.
            residual: quantization residual of `current`.
            round: number of the round.

        Returns:
            The next adapter, and the strategy state after the step.
        """
        if self._server_optimizer is None:
            return aggregated._replace(adapter=add_residual(aggregated.adapter, residual)), self.state
        trains, mean = self._aggregation.trains(round), aggregated.adapter
        before, after = (trained_tensors(adapter, trains, self.lora_xs_bases) for adapter in (current, mean))
        tensors, state = self._server_optimizer.step(before, after, self.state)
        stepped = add_residual(from_trained_tensors(tensors, trains, mean, self.lora_xs_bases), residual)
        return aggregated._replace(adapter=stepped), {**self.state, **state}

    def _update_control(
        self, control_update: ControlUpdate, plans: Mapping[UpdateKey, TrainingPlan], updates: UpdateSpool
    ) -> None:
        """Store the server's control variate after these updates."""
        for key, (adapter, _) in zip(updates.keys, updates, strict=True):
            control_update.add(plans[key], trained_tensors(adapter, plans[key].trains, self.lora_xs_bases))
        self.state = {**self.state, _CONTROL: control_update.next()}

    def _describe_noise(self) -> str:
        """Describe the planned noise of the run for the log."""
        parts = [f"σ = {self._plan.privacy.noise_multiplier:.3g} per step on devices"] if self._plan.privacy else []
        if level := self.central_dp:
            budget, z = level.budget, level.mechanism.noise_multiplier
            solved = f"for ε={budget.epsilon:g} per device (δ={budget.delta:g})"
            parts.append(
                f"σ = {z:.3g} per round on the server, {solved}, {level.mechanism.expected:g} devices expected"
            )
        return ", ".join(parts) or "no differential privacy"

    def _messages(self, request: Request) -> Iterable[Message]:
        return [self._message(request, node) for node in self._asked]

    def _message(self, request: Request, node: int) -> Message:
        return Message(records.request_to_records(request), node, records.message_type(request))


def _received(kind: str, replies: Iterable[Message], *, max_bytes: int = 0) -> Iterator[ReceivedReply]:
    """Yield the source and a decoder of each message; it reads at most `max_bytes` of an adapter."""
    for message in replies:
        error = message.error if message.has_error() else None
        read = error_rejection(error.code, error.reason) if error else partial(_read, kind, message, max_bytes)
        yield message.metadata.src_node_id, read


def _read(kind: str, message: Message, max_bytes: int) -> Reply:
    return records.reply_from_records(kind, message.content, max_bytes=max_bytes)
