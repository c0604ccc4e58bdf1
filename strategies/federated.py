"""Flower's Strategy, composed of an aggregation, a selection and a planner.

Stock strategies abort the run on one bad reply and turn one NaN into a model of NaN. Here whatever a device sends is
checked first; what fails is dropped and counted by its reason, and the round goes on with the others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from conf.errors import AntherError
from models.adapter import Adapter, Sites, from_tensors, rank, shapes, to_tensors
from protocol import records
from protocol.codec import CodecError, decode, encode
from protocol.messages import (
    DeviceReport,
    Evaluate,
    Evaluation,
    Personalise,
    Personalised,
    Query,
    Request,
    Train,
    TrainingPlan,
    Update,
)
from strategies.aggregation import Aggregation, squared_norm
from strategies.facts import DeviceFacts, PersonalFacts, TrainFacts, Validation
from strategies.planning import Limits, plan_for
from strategies.selection import Selection
from strategies.selection.everyone import Everyone

log = logging.getLogger(__name__)

_MOST_NORM = 100.0
"""Bound on ‖A‖_F, ‖B‖_F and ‖B A‖_F at one site: a fresh A of rank r has √r, and a layer's own W about √out.

With the product bounded the next adapter can't be one that honest devices are refused for.
"""

_LEAST, _MOST = 1e-6, 1e12
"""Numbers that a device tells of itself lie between: sums of them stay finite."""

_UNREACHABLE = (3, 4, 5)  # Flower's error codes: message, reply or node unavailable
_QUERY_TIMEOUT = 120.0  # seconds: a device starts a process to answer

R = TypeVar("R")
T = TypeVar("T")


class RefusedError(AntherError):
    """A reply that is not used, with the reason that it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What was sent for training, to hold the replies against."""

    adapter: Adapter
    plans: Mapping[int, tuple[DeviceReport, TrainingPlan]]
    bytes_down: int


class Federated(Strategy):
    """The strategy of a run.

    Args:
        plan: what a device without limits is asked to do each round; its `round` is replaced.
        sites: where adapters sit in the base that `plan` names.
        selection: who is asked to train in a round.
        evaluation: who is asked to measure the adapter after it (default: every device).
        accept_simulated: also take private updates made with reproducible noise, which are no releases: for tests
            and simulations only.

    After each leg, `trained`, `validation` and `personalised` hold its facts.
    """

    def __init__(
        self,
        *,
        plan: TrainingPlan,
        sites: Sites,
        aggregation: Aggregation,
        selection: Selection,
        limits: Limits,
        evaluation: Selection | None = None,
        accept_simulated: bool = False,
    ) -> None:
        if limits.metered_rank is not None and not aggregation.mixed_ranks:
            raise ValueError("limits.metered_rank: this aggregation takes one rank only; leave it None")
        self.sites = sites
        self._plan, self._limits = plan, limits
        self._aggregation, self._selection = aggregation, selection
        self._evaluation = evaluation or Everyone()
        self._accept_simulated = accept_simulated
        self._reports: dict[int, DeviceReport] = {}
        self._names: set[str] = set()  # of the reports
        self._unfit: dict[int, str] = {}
        self._events: dict[str, int] = {}  # in each device's ledger, the most that it told of
        self._round: _Round | None = None
        self._asked: dict[int, DeviceReport] = {}
        self.trained: TrainFacts | None = None
        self.validation: Validation | None = None
        self.personalised: PersonalFacts | None = None

    @property
    def may_measure(self) -> bool:
        """Whether devices may be asked for their loss: it is a release without noise, which a private run promises
        not to ask for; in a simulation nothing is released.
        """
        return self._plan.privacy is None or self._accept_simulated

    def remember(self, devices: Mapping[str, DeviceFacts]) -> None:
        """What a run that goes on knew of its devices: each is told how far its ledger had come."""
        for name, facts in devices.items():
            self._events[name] = max(self._events.get(name, 0), facts.events)

    def summary(self) -> None:
        plan = self._plan
        log.info(
            "run %s: %s of rank %d at %d sites, %d steps of %d a round, %s",
            plan.run, type(self._aggregation).__name__, plan.rank, len(self.sites), plan.steps, plan.batch_size,
            f"σ = {plan.privacy.noise_multiplier:.3g} a step" if plan.privacy else "no differential privacy",
        )  # fmt: skip

    def query(self, grid: Grid) -> dict[int, DeviceReport]:
        """Reports of the nodes that are there now and hold our base; only unknown nodes are asked."""
        present = set(grid.get_node_ids())
        if not self._reports.keys() <= present:
            # Whoever left may be back under another node id, refused so far because its name was taken.
            self._reports = {node: report for node, report in self._reports.items() if node in present}
            self._names = {report.device for report in self._reports.values()}
            self._unfit.clear()
        unknown = {node: None for node in sorted(present) if node not in self._reports and node not in self._unfit}
        if unknown:
            replies = grid.send_and_receive([self._message(Query(), node) for node in unknown], timeout=_QUERY_TIMEOUT)
            found, _ = _receive(records.QUERY, replies, unknown, lambda _, reply: reply)
            for node, report in sorted(found.items()):
                self._consider(node, report)
        return dict(self._reports)

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface: what we have to say is in the messages
        grid: Grid,
    ) -> Iterable[Message]:
        """A Train message for each selected device, with its own plan."""
        reports = self.query(grid)
        data = records.adapter_from_record(arrays)
        adapter = from_tensors(decode(data, shapes(self.sites, -1)))
        full = replace(self._plan, round=server_round, rank=min(self._plan.rank, rank(adapter)))
        upload = 4 * sum(site.inputs + site.outputs for site in self.sites.values())
        plans = {
            node: (report, plan_for(report, full, self._limits, download=len(data), upload_per_rank=upload))
            for node, report in _selected(self._selection, reports, server_round).items()
        }
        self._round = _Round(adapter=adapter, plans=plans, bytes_down=len(data) * len(plans))
        return [
            self._message(Train(plan=plan, adapter=data, echo=self._events.get(report.device, 0)), node)
            for node, (report, plan) in plans.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter, and what can be told as numbers; None for both when no reply was good."""
        if self._round is None:
            raise ValueError("aggregate_train before configure_train")
        asked = self._round
        found, dropped = _receive(records.TRAIN, replies, asked.plans, self._check_update)
        # By name: floating point sums depend on the order, and replies arrive in any.
        updates = sorted(found.values(), key=lambda pair: pair[0].device)
        diagnostics: dict[str, float] = {}
        arrays = metrics = None
        if updates:
            aggregated = self._aggregation.aggregate(
                asked.adapter, [(adapter, 1.0) for _, adapter in updates], round=server_round
            )
            diagnostics = aggregated.diagnostics
            arrays = records.adapter_to_record(encode(to_tensors(aggregated.adapter)))
            metrics = MetricRecord({"replied": len(updates), **diagnostics})
        else:
            log.warning("round %d: no good reply of %d: keeping the adapter", server_round, len(asked.plans))
        losses = [update.loss for update, _ in updates if update.loss is not None]
        plans = {report.device: plan for report, plan in asked.plans.values()}
        self.trained = TrainFacts(
            asked=len(asked.plans),
            replied=len(updates),
            dropped=dropped,
            bytes_down=asked.bytes_down,
            bytes_up=sum(len(update.adapter) for update, _ in updates),
            seconds=max((update.seconds for update, _ in updates), default=0.0),
            joules=sum(update.joules for update, _ in updates),
            loss=_mean(losses),
            epsilon=max((update.epsilon for update, _ in updates if update.epsilon is not None), default=None),
            diagnostics=diagnostics,
            devices={
                update.device: DeviceFacts(
                    rank=update.rank,
                    steps=plans[update.device].steps,
                    bytes_down=asked.bytes_down // len(asked.plans),
                    bytes_up=len(update.adapter),
                    seconds=update.seconds,
                    joules=update.joules,
                    epsilon=update.epsilon,
                    events=update.events,
                )
                for update, _ in updates
            },
        )
        self.remember(self.trained.devices)
        self._round = None  # a second aggregate of the same round would be a mistake
        return arrays, metrics

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface: what we have to say is in the messages
        grid: Grid,
    ) -> Iterable[Message]:
        """An Evaluate message for each device that is to measure this round's adapter."""
        self._asked = _selected(self._evaluation, self.query(grid), server_round)
        data = records.adapter_from_record(arrays)
        return self._ask(Evaluate(run=self._plan.run, round=server_round, adapter=data))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean validation losses of the base and of the adapter; None when no reply was good."""

        def check(report: DeviceReport, reply: Evaluation) -> Evaluation:
            _check_origin(report, reply.device)
            if reply.round != server_round:
                raise RefusedError("stale", f"{reply.device}: evaluated round {reply.round}, not {server_round}")
            if not (0 <= reply.base < _MOST and 0 <= reply.shared < _MOST):
                raise RefusedError("malformed", f"{reply.device}: losses must be 0 to {_MOST:g}")
            return reply

        found, dropped = _receive(records.EVALUATE, replies, self._asked, check)
        losses = sorted(found.values(), key=lambda reply: reply.device)
        base, shared = _mean([loss.base for loss in losses]), _mean([loss.shared for loss in losses])
        devices = {loss.device: loss.shared for loss in losses}
        self.validation = Validation(base=base, shared=shared, devices=devices, dropped=dropped)
        return None if base is None or shared is None else MetricRecord({"base": base, "shared": shared})

    def configure_personalise(
        self, request: Personalise, grid: Grid, names: Collection[str] | None = None
    ) -> Iterable[Message]:
        """A Personalise message for every device that is there and, where they are given, one of `names`."""
        self._asked = self.query(grid)
        if names is not None:
            self._asked = {node: report for node, report in self._asked.items() if report.device in names}
        return self._ask(request)

    def aggregate_personalise(self, replies: Iterable[Message]) -> PersonalFacts:
        """Who has a personal adapter now, and what it cost."""

        def check(report: DeviceReport, reply: Personalised) -> Personalised:
            _check_origin(report, reply.device)
            _check_cost(reply)
            return reply

        found, dropped = _receive(records.PERSONALISE, replies, self._asked, check)
        done = sorted(found.values(), key=lambda reply: reply.device)
        self.personalised = PersonalFacts(
            asked=len(self._asked),
            devices=tuple(reply.device for reply in done),
            dropped=dropped,
            seconds=max((reply.seconds for reply in done), default=0.0),
            joules=sum(reply.joules for reply in done),
        )
        return self.personalised

    def _consider(self, node: int, report: DeviceReport) -> None:
        """Take a new device in, or remember why not."""
        speeds = (report.examples_per_second, report.uplink_mbps, report.downlink_mbps)
        if report.base != self._plan.base:
            self._unfit[node] = f"holds base {report.base[:12]}, the run uses {self._plan.base[:12]}"
        elif report.device in self._names:
            self._unfit[node] = "its name is taken"
        elif not (report.device and all(_LEAST < speed < _MOST for speed in speeds)):
            self._unfit[node] = "its report has no name or no sensible speed"
        else:
            self._reports[node] = report
            self._names.add(report.device)
            return
        log.warning("device %r is not asked: %s", report.device[:100], self._unfit[node])

    def _ask(self, request: Request) -> Iterable[Message]:
        return [self._message(request, node) for node in self._asked]

    def _message(self, request: Request, node: int) -> Message:
        return Message(records.request_to_records(request), node, records.message_type(request))

    def _check_update(self, asked: tuple[DeviceReport, TrainingPlan], reply: Update) -> tuple[Update, Adapter]:
        """The update and its factors, if it is what the plan asked for; RefusedError or CodecError otherwise."""
        report, plan = asked
        _check_origin(report, reply.device)
        if (reply.run, reply.round) != (plan.run, plan.round):
            raise RefusedError("stale", f"{reply.device}: update of run {reply.run[:50]}, round {reply.round}")
        if reply.rank != plan.rank:
            raise RefusedError("rank", f"{reply.device}: trained rank {reply.rank}, was asked for {plan.rank}")
        if plan.privacy and not (reply.release or self._accept_simulated):
            raise RefusedError("not a release", f"{reply.device}: simulated noise, and this server is not in test mode")
        _check_cost(reply)
        if not 0 <= reply.events < _MOST:
            raise RefusedError("malformed", f"{reply.device}: events of its ledger must be 0 to {_MOST:g}")
        if reply.loss is not None and not 0 <= reply.loss < _MOST:
            raise RefusedError("malformed", f"{reply.device}: loss must be 0 to {_MOST:g}")
        adapter = from_tensors(decode(reply.adapter, shapes(self.sites, plan.rank)))
        for site, factors in adapter.items():
            a, b = factors.a.double(), factors.b.double()
            norm = max(float(a.norm()), float(b.norm()), float(squared_norm(a, b).sqrt()))
            if norm > _MOST_NORM:
                raise RefusedError("norm", f"{reply.device}: {site}: norm {norm:.3g} is over {_MOST_NORM:g}")
        return reply, adapter


def _selected(selection: Selection, reports: Mapping[int, DeviceReport], round: int) -> dict[int, DeviceReport]:
    """The nodes that a selection of their devices' names picks, in the order of those names."""
    nodes = {report.device: node for node, report in reports.items()}
    return {nodes[name]: reports[nodes[name]] for name in selection.select(nodes, round=round)}


def _receive(
    kind: str, replies: Iterable[Message], asked: Mapping[int, R], check: Callable[[R, Any], T]
) -> tuple[dict[int, T], dict[str, int]]:
    """What passed `check`, by node, and how many did not by reason; one reply for each node that was asked."""
    found: dict[int, T] = {}
    dropped: Counter[str] = Counter()
    heard = 0
    for message in replies:
        heard += 1
        node = message.metadata.src_node_id  # the SuperLink's own for an error about a node that is away
        try:
            if message.has_error():
                reason = "unreachable" if message.error.code in _UNREACHABLE else "failed"
                raise RefusedError(reason, f"error {message.error.code}: {_last_line(message.error.reason)}")
            if node not in asked or node in found:
                raise RefusedError("not asked", "a reply that nobody asked for, or a second one")
            found[node] = check(asked[node], records.reply_from_records(kind, message.content))
        except Exception as error:  # whatever a device sends, the server lives
            reason = error.reason if isinstance(error, RefusedError) else "malformed"
            dropped["codec" if isinstance(error, CodecError) else reason] += 1
            log.warning("%s: reply of node %d dropped: %s", kind, node, error)
    if heard < len(asked):
        dropped["no reply"] = len(asked) - heard
    return found, dict(sorted(dropped.items()))


def _check_origin(report: DeviceReport, device: str) -> None:
    if device != report.device:
        raise RefusedError("impostor", f"node of {report.device} signs as {device[:100]!r}")


def _check_cost(reply: Update | Personalised) -> None:
    if not (0 <= reply.seconds < _MOST and 0 <= reply.joules < _MOST):
        raise RefusedError("malformed", f"{reply.device}: seconds and joules must be 0 to {_MOST:g}")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last_line(text: str | None) -> str:
    """Of a traceback, the line that says what happened."""
    return ((text or "").strip().splitlines() or ["no reason given"])[-1][:300]
