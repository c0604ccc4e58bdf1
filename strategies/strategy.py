"""Flower's Strategy, composed of an aggregation, a selection and a planner.

Here are the legs of a round in Flower's terms. Who is there is in `strategies.round.connected_devices`, what is let in of their replies
in `strategies.round.validation`.
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
from strategies.aggregation import Aggregated, Aggregation, RankAware, Updates
from strategies.central_dp import CentralDP, changes
from strategies.clock import Clock, WallClock
from strategies.download import FP32, add_residual, download, lost
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planner
from strategies.planning.site_selection import SiteSelector
from strategies.private_evaluation import EvaluationPolicy
from strategies.robust.replay import ReplayFilter
from strategies.round.connected_devices import ConnectedDevices, RegisteredGrid, nodes_by_name
from strategies.round.history import History
from strategies.round.ledger_coverage import clipped, explained
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
from strategies.round.update_spool import UpdateKey, UpdateSpool, size
from strategies.round.updates import RoundRequest, RoundUpdates
from strategies.round.validation import ReceivedReply, ReplyValidator, error_rejection, validate_replies
from strategies.scaffold import ControlUpdate, initial_control
from strategies.selection import DeviceCandidate, DeviceCandidates, NameSelection, Selection
from strategies.selection.eligible import ALL_DEVICES, Eligibility
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
from strategies.server_optimizers import ServerOptimizer, StrategyState, Tensors
from strategies.validation import check

log = logging.getLogger(__name__)

_CONTROL = "control"  # part of the memory

_QUERY_TIMEOUT = 120.0  # seconds: a device starts a process to answer
_QUERY_WAIT = 5.0  # seconds that the others wait for the answer of a newcomer, which may also come later
_QUERY_STALE = 30.0  # seconds that they wait for those who are in, where it matters how these are now


class Federated(Strategy):
    """The strategy of a run.

    Args:
        plan: what a device without limits is asked to do each round; its `round` is replaced, and what
            it trains is the aggregation's to say.
        sites: where adapters sit in the base that `plan` names.
        selection: who is asked to train in a round.
        evaluation: who is asked to measure the adapter after it (default: every device).
        measuring: after which rounds, and what hides whom in the result (default: after each, openly; in a private run
            after none).
        optimiser: takes the step that a round's mean points to; None: the mean is the next adapter.
        download: precision that adapters are sent in.
        frame: the factors that stay, of an aggregation of cores between them.
        decay: of the plan's learning rate, by the number of a round (default: it stays).
        accept_simulated: also take private updates made with reproducible noise, which are no releases: for tests
            and simulations only.
        device_level: clips and noises what devices send; None: their updates are aggregated as they are.
        replay: refuses what was sent in earlier rounds; None: nobody looks.
        quorum: good replies without which a round keeps the adapter.
        eligible: who may be asked to train. With privacy per device others are drawn with everybody, and charged, then
            not asked, and nobody in their place: who else is asked, now or later, would tell of them.
        fitting: chooses the sites that each device trains at; None: all of them.
        clock: that reports age by.
        adapted: names of the sites, where they are not what the base's family adapts; None: they are.
        timesteps: at which devices measure the loss of a picture.
        report_age: seconds after which a report is asked for again, where anything goes by a device's moment.

    `memory` is what the server's optimiser remembers after the last round; whoever goes on with a run sets it. After
    each leg, `trained`, `validation` and `personalised` hold its facts; while one of training goes on, `accepted` is how
    many replies were let in so far, and `eligible_nodes` are the nodes that could be asked when some last were.
    Nodes in `busy_nodes` are not asked to train, and no more than `max_new` of them (None: as many as are selected).
    """

    def __init__(
        self,
        *,
        plan: TrainingPlan,
        sites: Sites,
        aggregation: Aggregation,
        selection: Selection,
        limits: PlanLimits,
        evaluation: NameSelection | None = None,
        measuring: EvaluationPolicy | None = None,
        optimiser: ServerOptimizer | None = None,
        download: str = FP32,
        lora_xs_bases: Adapter | None = None,
        decay: Callable[[float, int], float] | None = None,
        accept_simulated: bool = False,
        central_dp: CentralDP | None = None,
        replay: ReplayFilter | None = None,
        quorum: int = 1,
        eligible: Eligibility = ALL_DEVICES,
        fitting: SiteSelector | None = None,
        clock: Clock | None = None,
        report_age: float = math.inf,
        adapted: tuple[str, ...] | None = None,
        timesteps: int = 3,
    ) -> None:
        measuring = measuring or EvaluationPolicy(every=0 if plan.privacy or central_dp else 1)
        check(
            plan=plan,
            aggregation=aggregation,
            selection=selection,
            limits=limits,
            measuring=measuring,
            optimiser=optimiser,
            download=download,
            lora_xs_bases=lora_xs_bases,
            central_dp=central_dp,
            replay=replay,
            quorum=quorum,
            fitting=fitting,
        )
        self.sites, self.lora_xs_bases, self.central_dp = sites, lora_xs_bases, central_dp
        self._plan, self._limits, self._decay = plan, limits, decay
        self._adapted, self._timesteps = adapted, timesteps
        self._aggregation, self._selection = aggregation, selection
        self._evaluation = evaluation or Everyone()
        self._measuring = measuring
        self._optimiser, self._download, self._replay = optimiser, download, replay
        self.memory: StrategyState = {}
        self._checks = ReplyValidator(
            sites=sites, lora_xs_bases=lora_xs_bases, accept_simulated=accept_simulated, measuring=measuring
        )
        self._roster = ConnectedDevices(plan.base)
        self._eligible = eligible
        self._planner = Planner(sites=sites, limits=limits, mixed_ranks=aggregation.mixed_ranks, fitting=fitting)
        self._clock, self._report_age = clock or WallClock(), report_age
        self._history = History()
        self._round: RoundRequest | None = None
        self._held: RoundUpdates | None = None  # room on the disk for a round that is charged for
        self._asked: dict[int, DeviceReport] = {}
        self._personal: tuple[TrainingPlan, float | None] = plan, None
        self._measured = False
        self.quorum = quorum
        self.accepted = 0
        self._spendable: float | None = None  # ε per picture that what was asked for last can have come to
        self.eligible_nodes: set[int] = set()
        self.busy_nodes: set[int] = set()
        self.max_new: int | None = None
        self.trained: TrainMetrics | None = None
        self.validation: ValidationMetrics | None = None
        self.personalised: PersonalizationMetrics | None = None

    @property
    def private(self) -> bool:
        """Whether anything is promised: then nothing is chosen, told or measured by what was not noised."""
        return self._plan.privacy is not None or self.central_dp is not None

    @property
    def can_redraw(self) -> bool:
        """Whether a round that nobody could be asked in may be drawn once more: not where a sample is charged for."""
        return self.central_dp is None and not isinstance(self._selection, Poisson)

    def is_evaluated(self, round: int) -> bool:
        """Whether devices are asked to measure this round's adapter."""
        return self._measuring.due(round)

    def remember(self, devices: Mapping[str, DeviceMetrics], rounds: Iterable[TrainMetrics | None] = ()) -> None:
        """What a run that goes on knew of its devices, and of its rounds.

        Each device is told how far its ledger had come, and a selection goes by the rest.
        """
        self._history.remember(devices, rounds)

    def summary(self) -> None:
        plan = self._plan
        log.info(
            "run %s: %s of rank %d at %d sites, %d steps of %d a round, %s",
            plan.run,
            type(self._aggregation).__name__,
            plan.rank,
            len(self.sites),
            plan.steps,
            plan.batch_size,
            self._promise(),
        )

    def query(self, grid: Grid) -> dict[int, DeviceReport]:
        """Reports of the nodes that are there now and hold our base; only unknown nodes are asked.

        With privacy per device those that were asked anew and are silent are there with what they told last: without
        them others would be drawn.
        """
        if nodes_to_query := self._roster.nodes_to_query(set(grid.get_node_ids()), now=self._clock.now()):
            messages = [self._message(Query(adapted=self._adapted), node) for node in nodes_to_query]
            names: Mapping[int, str] = {}
            if isinstance(grid, RegisteredGrid):
                names = grid.names()
                wait = _QUERY_STALE if self._roster.stale else _QUERY_WAIT
                replies = grid.query_nodes(messages, timeout=_QUERY_TIMEOUT, wait=wait)
            else:
                replies = iter(grid.send_and_receive(messages, timeout=_QUERY_TIMEOUT))
            heard = _heard(records.QUERY, replies)
            found, _ = validate_replies(records.QUERY, heard, dict.fromkeys(nodes_to_query), lambda _, reply: reply)
            for node, report in sorted(found.items()):
                self._roster.update_report(node, report, now=self._clock.now(), registered=names.get(node))
        reports, stale = self._roster.reports, () if self.central_dp else self._roster.stale
        return {node: report for node, report in reports.items() if node not in stale}

    def _recent(self, grid: Grid) -> dict[int, DeviceReport]:
        """The same, where what a device tells of its moment is as young as it has to be."""
        if (
            self._eligible.uses_transient_state
            or self._limits.uses_transient_state
            or self._selection.sensitivity.uses_transient_state
        ):
            self._roster.mark_stale(before=self._clock.now() - self._report_age, but=self.busy_nodes)
        return self.query(grid)

    def _candidates(
        self, reports: Mapping[int, DeviceReport], full: TrainingPlan, adapter: Adapter, download: int, round: int
    ) -> DeviceCandidates:
        """Each device that could do something of this, with the plan that it would get.

        With privacy per device whoever can't is there too, with the plan that others get.
        """
        plans = self._planner.plans(reports.values(), full, adapter=adapter, download=download)
        found = {}
        for node, report in reports.items():
            fits = plans.get(report.device)
            planned = self._planner.whole(report, full, download=download) if self.central_dp and not fits else fits
            if planned:
                found[report.device] = DeviceCandidate(
                    report=report,
                    plan=planned.plan,
                    seconds=planned.seconds,
                    joules=planned.joules,
                    ready=fits is not None and node not in self._roster.stale and self._eligible(report),
                    facts=self._history.devices.get(report.device),
                )
        return DeviceCandidates(found, self._history.losses, round=round)

    def _picked(self, candidates: DeviceCandidates, draw: int) -> list[DeviceCandidate]:
        """Whom the selection picks to train, or as many of them as there is room for.

        With privacy per device also some who can't be asked: whoever stood in for them, now or later, would tell.
        """
        ready = {name: one for name, one in candidates.items() if one.ready}
        allowed = DeviceCandidates(ready, candidates.losses, round=candidates.round)
        picked = self._selection.select(candidates if self.central_dp else allowed, draw=draw)
        if self.max_new is not None and len(picked) > self.max_new:
            picked = sorted(random.Random(derive_seed(self._plan.run, draw, "room")).sample(picked, self.max_new))
        return [candidates[name] for name in picked]

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface: what we have to say is in the messages
        grid: Grid,
        *,
        number: int | None = None,
        draw: int | None = None,
    ) -> Iterable[Message]:
        """A Train message for each selected device, with its own plan.

        Args:
            number: of these plans; None: the round's.
            draw: of the coins that are tossed for them; None: the plans' number.

        Raises:
            AntherError: with privacy per device, no room on the disk for all updates; nothing is charged.
        """
        number = server_round if number is None else number
        reports = {node: report for node, report in self._recent(grid).items() if node not in self.busy_nodes}
        if self.central_dp:
            may = self.central_dp.eligible([report.device for report in reports.values()])
            reports = {node: report for node, report in reports.items() if report.device in may}
        held = from_tensors(decode(records.adapter_from_record(arrays), adapter_shapes(self.sites, -1)))
        data, adapter, rounded = download(held, self._download)
        trains = self._aggregation.trains(server_round)
        start: Tensors = {}
        control: Tensors = {}
        if self._plan.scaffold:
            start = trained_tensors(adapter, trains, self.lora_xs_bases)
            control = initial_control(self.memory.get(_CONTROL), start)
        if self.lora_xs_bases or control:  # what is beside the adapter is sent whole, and so is the adapter
            tensors = to_tensors_with_bases(adapter, self.lora_xs_bases) if self.lora_xs_bases else to_tensors(adapter)
            data = encode(tensors | to_control_tensors(control))
        full = replace(self._plan, round=number, rank=min(self._plan.rank, rank(adapter)), trains=trains)
        if self._decay:
            full = replace(full, learning_rate=self._decay(full.learning_rate, server_round))
        nodes, candidates = nodes_by_name(reports), self._candidates(reports, full, adapter, len(data), server_round)
        self.eligible_nodes = {nodes[name] for name, one in candidates.items() if one.ready}
        picked = self._picked(candidates, number if draw is None else draw)
        plans = {nodes[one.report.device]: (one.report, one.plan) for one in picked if one.ready}
        self.accepted = 0
        if self.central_dp:
            # On a full disk one reply would keep out another. For all who were picked: who can't be asked isn't told.
            self._held = RoundUpdates(len(picked) * size(self.sites, full.rank))
            self.central_dp.open(server_round, [one.report.device for one in picked], data)
        self._spendable = self._explained(server_round, measured=server_round - 1)  # before any reply is here to wait
        self._round = RoundRequest(
            adapter=adapter,
            plans=plans,
            not_contacted=tuple(one.report.device for one in picked if not one.ready),
            bytes_down=len(data) * len(plans),
            control_update=ControlUpdate(control, start, devices=len(candidates)) if control else None,
            lost={} if rounded is None or self._aggregation.sensitivity.turned else lost(held, adapter),
            sent_at=self._now(grid),
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
        """The next adapter, and what can be told as numbers; None for both when no reply was good.

        With privacy per device the adapter is noised and released also then, and whatever came back; None for both if
        devices would refuse what is to be released.
        """
        asked, held = self.sent(), self._held
        self._held = None
        with RoundUpdates() if held is None else held as found:
            dropped = self.accept_replies(asked, replies, found)
            arrays = self.close(server_round, asked.adapter, [asked], found, dropped, lost=asked.lost)
        return arrays, None if arrays is None else MetricRecord({"replied": len(found), **self._diagnostics()})

    def sent(self) -> RoundRequest:
        """What the last `configure_train` asked for, once: a second aggregate of the same round would be a mistake."""
        if self._round is None:
            raise ValueError("aggregate_train before configure_train")
        asked, self._round = self._round, None
        return asked

    def accept_replies(
        self,
        asked: RoundRequest,
        replies: Iterable[Message],
        found: RoundUpdates,
        *,
        shift: Callable[[Adapter], Adapter] = lambda trained: trained,
    ) -> dict[str, int]:
        """Add the good replies to what was asked to those that were found; how many were dropped, by reason.

        Args:
            shift: what counts as trained, of the adapter that a device made of the one that it was sent.
        """
        most = max((self._checks.largest(plan) for _, plan in asked.plans.values()), default=0)

        def take_in(sent: tuple[DeviceReport, TrainingPlan], reply: Update) -> None:
            update, adapter = self._checks.update(asked.adapter, sent, reply)
            found.told = largest([found.told, update.epsilon])
            seconds, joules = self._believed(*sent, update, asked.sent_at)
            epsilon = clipped(update.epsilon, self._spendable)
            update = replace(update, epsilon=epsilon, seconds=seconds, joules=joules)
            if self._replay:
                self._replay.check(asked.adapter, update.device, adapter, self.memory, found.sketches)
            found.add(update, shift(adapter))
            self.accepted += 1

        _, dropped = validate_replies(records.TRAIN, _heard(records.TRAIN, replies, most=most), asked.plans, take_in)
        return dropped

    def close(
        self,
        server_round: int,
        current: Adapter,
        asked: Sequence[RoundRequest],
        found: RoundUpdates,
        dropped: Mapping[str, int],
        *,
        lost: Mapping[str, Tensor] | None = None,
    ) -> ArrayRecord | None:
        """The adapter after a round that made these updates of `current`; None to keep that. `trained` tells of it.

        Args:
            lost: what rounding took of `current`, and enters what the round makes of it.
        """
        ranks = {update.rank for update in found.updates}
        aggregated, central = self._aggregated(current, found.adapters, ranks, server_round, lost or {})
        if self._replay:
            self.memory = self._replay.remember(self.memory, found.sketches)
        plans = {(report.device, plan.round): plan for each in asked for report, plan in each.plans.values()}
        if aggregated is None:
            accepted = f"{len(found)} good replies of {len(plans)}"
            log.warning("round %d: keeping the adapter: %s", server_round, accepted)
        for each in asked if aggregated else ():
            if each.control_update:
                self._follow(each.control_update, plans, found.adapters)
        updates = found.updates
        if any(each.sent_at is not None for each in asked):
            seconds = cap_to_median([update.seconds for update in updates])
            joules = cap_to_median([update.joules for update in updates])
            updates = [
                replace(update, seconds=s, joules=j) for update, s, j in zip(updates, seconds, joules, strict=True)
            ]
        self.trained = train_metrics(
            updates,
            round=server_round,
            plans=plans,
            not_contacted=[name for each in asked for name in each.not_contacted],
            bytes_down=sum(each.bytes_down for each in asked),
            bytes_up=found.bytes_up,
            dropped=dropped,
            private=self._plan.privacy,
            spent=self._history.spent,
            told=found.told,
            strict=self._explained(server_round, measured=server_round, delta=STRICT_DELTA),
            central=central,
            diagnostics=aggregated.diagnostics if aggregated else {},
        )
        if (told := found.told) and told > 1.01 * (explained := self.trained.epsilon or told):
            log.info("a device's ledger holds ε=%.3g per picture, of which this run explains ε=%.3g", told, explained)
        self._history.add_round(self.trained)
        return records.adapter_to_record(encode(to_tensors(aggregated.adapter))) if aggregated else None

    def _now(self, grid: Grid) -> float | None:
        """The time, where devices work by the same as this server."""
        return self._clock.now() if isinstance(grid, RegisteredGrid) else None

    def _believed(
        self, report: DeviceReport, plan: TrainingPlan, told: Update | Personalized, sent_at: float | None
    ) -> tuple[float, float]:
        """Seconds and joules that a device's work counts with."""
        elapsed = None if sent_at is None else self._clock.now() - sent_at
        return plausible_cost(report, plan, (told.seconds, told.joules), sites=self.sites, elapsed=elapsed)

    def _explained(self, rounds: int, *, measured: int, delta: float | None = None) -> float | None:
        """ε per picture that so many rounds come to, with what was measured after as many; None without, or at a δ
        that the plan's doesn't exceed.
        """
        if self._plan.privacy is None or (delta and self._plan.privacy.delta <= delta):
            return None
        measuring = self._measuring
        times = sum(measuring.due(number) for number in range(1, measured + 1))
        return explained(self._plan, rounds=rounds, measuring=measuring.local_noise, measured=times, delta=delta)

    def _diagnostics(self) -> dict[str, float]:
        return self.trained.diagnostics if self.trained else {}

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface: what we have to say is in the messages
        grid: Grid,
    ) -> Iterable[Message]:
        """An Evaluate message for each device that is to measure this round's adapter; none in a round without."""
        data, rounded = self._down(records.adapter_from_record(arrays))
        self._measured = self.is_evaluated(server_round) and self._paid(server_round, data)
        self._asked = self._panel(self.query(grid), server_round) if self._measured else {}
        private = self._measuring.local_noise
        if self._asked and private:
            self._spendable = self._explained(server_round, measured=server_round)
        return self._ask(
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

    def _down(self, whole: bytes) -> tuple[bytes, QuantizedFormat | None]:
        """What travels of an adapter, and how it is to be read."""
        if self._download == FP32:
            return whole, None
        data, _, rounded = download(from_tensors(decode(whole, adapter_shapes(self.sites, -1))), self._download)
        return data, rounded

    def _panel(self, reports: Mapping[int, DeviceReport], round: int) -> dict[int, DeviceReport]:
        """Who measures."""
        nodes = nodes_by_name(reports)
        return {nodes[name]: reports[nodes[name]] for name in self._evaluation.select(nodes, draw=round)}

    def _paid(self, round: int, adapter: bytes) -> bool:
        """Whether a measurement that the server noises is charged for; devices charge for their own."""
        hidden = self._measuring.central_noise
        if not (self.central_dp and hidden):
            return True
        mechanism = PoissonGaussian(noise_multiplier=hidden.noise_multiplier, sampling_rate=1.0, steps=1)
        return self.central_dp.charge_evaluation(
            round, adapter, mechanism, clip=hidden.clip, expected=float(hidden.devices)
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean validation losses of the base and of the adapter, or a noised gain; None when there is neither."""

        def check(report: DeviceReport, reply: Evaluation) -> Evaluation:
            checked = self._checks.evaluation(server_round, report, reply)
            return replace(checked, epsilon=clipped(checked.epsilon, self._spendable))

        found, dropped = validate_replies(records.EVALUATE, _heard(records.EVALUATE, replies), self._asked, check)
        told = ValidationMetrics(base=None, shared=None, dropped=dropped)
        if self._measured:
            accepted = sorted(found.values(), key=lambda reply: reply.device)
            told = self._measuring.summary(server_round, accepted, dropped)
        self.validation = told
        self._history.spent = largest([self._history.spent, told.epsilon])
        values = {name: getattr(told, name) for name in ("base", "shared", "gain", "gain_error")}
        measured = {name: value for name, value in values.items() if value is not None}
        return MetricRecord(measured) if measured else None

    def configure_personalise(
        self, request: Personalize, grid: Grid, names: Collection[str] | None = None
    ) -> Iterable[Message]:
        """A Personalise message for every device that is there and, where they are given, one of `names`."""
        data, rounded = self._down(request.adapter)
        request = replace(request, adapter=data, rounded=rounded, adapted=self._adapted, timesteps=self._timesteps)
        self._asked = self.query(grid)
        if names is not None:
            self._asked = {node: report for node, report in self._asked.items() if report.device in names}
        plan = replace(self._plan, rank=request.rank, steps=request.steps, batch_size=request.batch_size, privacy=None)
        self._personal = plan, self._now(grid)
        return self._ask(request)

    def aggregate_personalise(self, replies: Iterable[Message]) -> PersonalizationMetrics:
        """Who has a personal adapter now, and what it cost."""
        plan, sent_at = self._personal

        def check(report: DeviceReport, reply: Personalized) -> Personalized:
            checked = self._checks.personalised(report, reply)
            seconds, joules = self._believed(report, plan, checked, sent_at)
            return replace(checked, seconds=seconds, joules=joules)

        heard = _heard(records.PERSONALIZE, replies)
        found, dropped = validate_replies(records.PERSONALIZE, heard, self._asked, check)
        done = sorted(found.values(), key=lambda reply: reply.device)
        costs = [reply.seconds for reply in done], [reply.joules for reply in done]
        seconds, joules = costs if sent_at is None else map(cap_to_median, costs)
        self.personalised = PersonalizationMetrics(
            asked=len(self._asked),
            devices=tuple(reply.device for reply in done),
            dropped=dropped,
            seconds=max(seconds, default=0.0),
            joules=sum(joules),
        )
        return self.personalised

    def _aggregated(
        self, current: Adapter, updates: Updates, ranks: Collection[int], round: int, lost: Mapping[str, Tensor]
    ) -> tuple[Aggregated | None, CentralDPMetrics | None]:
        """The next adapter, None to keep the current one, and what the server's noise came to."""
        central = None
        if self.central_dp:
            trained = (adapter for adapter, _ in updates)
            mean, central = self.central_dp.close(self._aggregation, current, trained, round=round)
        elif len(updates) < self.quorum:
            return None, None
        else:
            rule = (
                self._aggregation.with_ranks(ranks) if isinstance(self._aggregation, RankAware) else self._aggregation
            )
            mean = rule.aggregate(current, updates, round=round)
        aggregated, memory = self._stepped(current, mean, lost, round)
        if found := norm_violation(
            aggregated.adapter
        ):  # of updates that were each let in, or of what is released anyway
            log.warning("round %d: keeping the adapter, since devices would refuse the next: %s", round, found)
            return None, central
        self.memory = memory
        if central:
            return aggregated, central
        # What began at an older adapter may lie on this one in stacked factors: they have no change to compare.
        if self._plan.privacy is None or any(rank(adapter) > rank(current) for adapter, _ in updates):
            return aggregated, None
        layout = trained_layout(
            self.sites, rank(current), self._aggregation.trains(round), self.lora_xs_bases or current
        )
        snr = signal_to_spread(changes(layout, current, (adapter for adapter, _ in updates)))
        return aggregated._replace(diagnostics=aggregated.diagnostics | ({} if snr is None else {"snr": snr})), None

    def _stepped(
        self, current: Adapter, aggregated: Aggregated, lost: Mapping[str, Tensor], round: int
    ) -> tuple[Aggregated, StrategyState]:
        """The step that the server makes of a round, from where it really stood, and what it is going to remember."""
        if self._optimiser is None:
            return aggregated._replace(adapter=add_residual(aggregated.adapter, lost)), self.memory
        trains, made = self._aggregation.trains(round), aggregated.adapter
        before, after = (trained_tensors(adapter, trains, self.lora_xs_bases) for adapter in (current, made))
        found, memory = self._optimiser.step(before, after, self.memory)
        stepped = add_residual(from_trained_tensors(found, trains, made, self.lora_xs_bases), lost)
        return aggregated._replace(adapter=stepped), {**self.memory, **memory}

    def _follow(
        self, control_update: ControlUpdate, plans: Mapping[UpdateKey, TrainingPlan], updates: UpdateSpool
    ) -> None:
        """Remember the server's control variate after these updates."""
        for key, (adapter, _) in zip(updates.keys, updates, strict=True):
            control_update.add(plans[key], trained_tensors(adapter, plans[key].trains, self.lora_xs_bases))
        self.memory = {**self.memory, _CONTROL: control_update.next()}

    def _promise(self) -> str:
        """The noise that a run is planned with, in words."""
        said = [f"σ = {self._plan.privacy.noise_multiplier:.3g} a step on devices"] if self._plan.privacy else []
        if level := self.central_dp:
            budget, z = level.budget, level.mechanism.noise_multiplier
            solved = f"for ε={budget.epsilon:g} per device (δ={budget.delta:g})"
            said.append(f"σ = {z:.3g} a round on the server, {solved}, {level.mechanism.expected:g} devices expected")
        return ", ".join(said) or "no differential privacy"

    def _ask(self, request: Request) -> Iterable[Message]:
        return [self._message(request, node) for node in self._asked]

    def _message(self, request: Request, node: int) -> Message:
        return Message(records.request_to_records(request), node, records.message_type(request))


def _heard(kind: str, replies: Iterable[Message], *, most: int = 0) -> Iterator[ReceivedReply]:
    """Who sent each message, and what reads it: of an adapter no more than `most` bytes are looked at."""
    for message in replies:
        error = message.error if message.has_error() else None
        read = error_rejection(error.code, error.reason) if error else partial(_read, kind, message, most)
        yield message.metadata.src_node_id, read


def _read(kind: str, message: Message, most: int) -> Reply:
    return records.reply_from_records(kind, message.content, most=most)
