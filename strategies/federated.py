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

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from conf.errors import AntherError
from models.adapter import Adapter, Sites, from_tensors, head_and_tail, rank, shapes, to_tensors
from models.bounds import excess
from models.cores import between, core_shapes, to_framed_tensors
from models.slots import trained_layout
from privacy.accounting import Guarantee, PoissonGaussian
from privacy.snr import signal_to_spread
from protocol import records
from protocol.codec import CodecError, decode, encode, largest
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
from strategies.aggregation import Aggregated, Aggregation
from strategies.facts import CentralFacts, DeviceFacts, PersonalFacts, TrainFacts, Validation
from strategies.measuring import Measuring
from strategies.planning import Cosine, Limits, plan_for
from strategies.private import DeviceLevel, changes
from strategies.selection import Selection
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson

log = logging.getLogger(__name__)

_LEAST, _MOST = 1e-6, 1e12
"""Numbers that a device tells of itself lie between: sums of them stay finite."""

_REASONS = {  # of error codes: message, reply or node unavailable are Flower's
    3: "unreachable",
    4: "unreachable",
    5: "unreachable",
    records.UNREADABLE: "malformed",
}
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
        measuring: after which rounds, and what hides whom in the result (default: after each, openly; in a private run
            after none).
        frame: the factors that stay, of a plan that trains cores between them.
        decay: of the plan's learning rate (default: it stays).
        accept_simulated: also take private updates made with reproducible noise, which are no releases: for tests
            and simulations only.
        device_level: clips and noises what devices send; None: their updates are aggregated as they are.

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
        measuring: Measuring | None = None,
        frame: Adapter | None = None,
        decay: Cosine | None = None,
        accept_simulated: bool = False,
        device_level: DeviceLevel | None = None,
    ) -> None:
        if plan.cores != (frame is not None):
            raise ValueError("a plan that trains cores needs their frame, and no other does")
        if device_level and not aggregation.sensitivity.linear:
            raise ValueError(f"not linear in the updates: {aggregation.sensitivity.reason}")
        drawn = selection.rate if isinstance(selection, Poisson) else 1.0
        if device_level and device_level.sampling_rate != drawn:
            raise ValueError(f"accounted with a sampling rate of {device_level.sampling_rate}, selected with {drawn}")
        if limits.metered_rank is not None and not aggregation.mixed_ranks:
            raise ValueError("limits.metered_rank: this aggregation takes one rank only; leave it None")
        measuring = measuring or Measuring(every=0 if plan.privacy or device_level else 1)
        if measuring.every and plan.privacy and not measuring.among_pictures:
            raise ValueError("measuring: a private plan promises to ask no device for a measure without noise")
        if measuring.every and device_level and not measuring.among_devices:
            raise ValueError("measuring: a run that is private per device keeps no measure without noise")
        self.sites, self.frame, self.device_level = sites, frame, device_level
        self._plan, self._limits, self._decay = plan, limits, decay
        self._aggregation, self._selection = aggregation, selection
        self._evaluation = evaluation or Everyone()
        self._measuring = measuring
        self._accept_simulated = accept_simulated
        self._reports: dict[int, DeviceReport] = {}
        self._names: set[str] = set()  # of the reports
        self._unfit: dict[int, str] = {}
        self._events: dict[str, int] = {}  # in each device's ledger, the most that it told of
        self._round: _Round | None = None
        self._asked: dict[int, DeviceReport] = {}
        self._measured = False
        self.trained: TrainFacts | None = None
        self.validation: Validation | None = None
        self.personalised: PersonalFacts | None = None

    @property
    def private(self) -> bool:
        """Whether anything is promised: then nothing is chosen, told or measured by what was not noised."""
        return self._plan.privacy is not None or self.device_level is not None

    def measures(self, round: int) -> bool:
        """Whether devices are asked to measure this round's adapter."""
        return self._measuring.due(round)

    def remember(self, devices: Mapping[str, DeviceFacts]) -> None:
        """What a run that goes on knew of its devices: each is told how far its ledger had come."""
        for name, facts in devices.items():
            self._events[name] = max(self._events.get(name, 0), facts.events)

    def summary(self) -> None:
        plan = self._plan
        log.info(
            "run %s: %s of rank %d at %d sites, %d steps of %d a round, %s",
            plan.run, type(self._aggregation).__name__, plan.rank, len(self.sites), plan.steps, plan.batch_size,
            self._promise(),
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
        if self.device_level:
            may = self.device_level.eligible([report.device for report in reports.values()])
            reports = {node: report for node, report in reports.items() if report.device in may}
        data = records.adapter_from_record(arrays)
        adapter = from_tensors(decode(data, shapes(self.sites, -1)))
        if self.frame:
            data = encode(to_framed_tensors(adapter, self.frame))
        full = replace(self._plan, round=server_round, rank=min(self._plan.rank, rank(adapter)))
        if self._decay:
            full = replace(full, learning_rate=self._decay(full.learning_rate, server_round))
        upload = 4 * sum(site.inputs + site.outputs for site in self.sites.values())
        if self.frame:
            upload = 4 * len(self.sites) * full.rank
        plans = {
            node: (report, plan_for(report, full, self._limits, download=len(data), upload_per_rank=upload))
            for node, report in _selected(self._selection, reports, server_round).items()
        }
        if self.device_level:
            self.device_level.open(server_round, [report.device for report, _ in plans.values()], data)
        self._round = _Round(adapter=adapter, plans=plans, bytes_down=len(data) * len(plans))
        return [
            self._message(Train(plan=plan, adapter=data, echo=self._events.get(report.device, 0)), node)
            for node, (report, plan) in plans.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter, and what can be told as numbers; None for both when no reply was good.

        With privacy per device the adapter is noised and released also then, and whatever came back.
        """
        if self._round is None:
            raise ValueError("aggregate_train before configure_train")
        asked = self._round
        most = largest(self._trained_shapes(max((plan.rank for _, plan in asked.plans.values()), default=0)))
        found, dropped = _receive(records.TRAIN, replies, asked.plans, self._check_update, most=most)
        # By name: floating point sums depend on the order, and replies arrive in any.
        updates = sorted(found.values(), key=lambda pair: pair[0].device)
        aggregated, central = self._aggregated(asked.adapter, [adapter for _, adapter in updates], server_round)
        diagnostics = aggregated.diagnostics if aggregated else {}
        arrays = metrics = None
        if aggregated:
            arrays = records.adapter_to_record(encode(to_tensors(aggregated.adapter)))
            metrics = MetricRecord({"replied": len(updates), **diagnostics})
        else:
            log.warning("round %d: no good reply of %d: keeping the adapter", server_round, len(asked.plans))
        losses = [update.loss for update, _ in updates if update.loss is not None and not self.private]
        spent = max((update.epsilon for update, _ in updates if update.epsilon is not None), default=None)
        plans = {report.device: plan for report, plan in asked.plans.values()}
        self.trained = TrainFacts(
            asked=len(asked.plans),
            replied=len(updates),
            dropped=dropped | ({"not finite": central.dropped} if central and central.dropped else {}),
            bytes_down=asked.bytes_down,
            bytes_up=sum(len(update.adapter) for update, _ in updates),
            seconds=max((update.seconds for update, _ in updates), default=0.0),
            joules=sum(update.joules for update, _ in updates),
            loss=_mean(losses),
            epsilon=spent,
            guarantees=self._guarantees(spent, central),
            central=central,
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
        """An Evaluate message for each device that is to measure this round's adapter; none in a round without."""
        data = records.adapter_from_record(arrays)
        self._measured = self.measures(server_round) and self._paid(server_round, data)
        self._asked = _selected(self._evaluation, self.query(grid), server_round) if self._measured else {}
        private = self._measuring.among_pictures
        return self._ask(Evaluate(run=self._plan.run, round=server_round, adapter=data, privacy=private))

    def _paid(self, round: int, adapter: bytes) -> bool:
        """Whether a measurement that the server noises is charged for; devices charge for their own."""
        hidden = self._measuring.among_devices
        if not (self.device_level and hidden):
            return True
        mechanism = PoissonGaussian(noise_multiplier=hidden.noise_multiplier, sampling_rate=1.0, steps=1)
        return self.device_level.pays_for(round, adapter, mechanism, clip=hidden.clip, expected=float(hidden.devices))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean validation losses of the base and of the adapter, or a noised gain; None when there is neither."""

        def check(report: DeviceReport, reply: Evaluation) -> Evaluation:
            _check_origin(report, reply.device)
            if reply.round != server_round:
                raise RefusedError("stale", f"{reply.device}: evaluated round {reply.round}, not {server_round}")
            if not self._measuring.fits(reply):
                raise RefusedError("malformed", f"{reply.device}: tells other measures than it was asked for")
            if reply.gain is not None and not (reply.release or self._accept_simulated):
                raise RefusedError(
                    "not a release", f"{reply.device}: simulated noise, and this server is not in test mode"
                )
            numbers = [value for value in (reply.base, reply.shared, reply.epsilon) if value is not None]
            if not (all(0 <= value < _MOST for value in numbers) and abs(reply.gain or 0.0) < _MOST):
                raise RefusedError("malformed", f"{reply.device}: losses must be 0 to {_MOST:g}")
            return reply

        found, dropped = _receive(records.EVALUATE, replies, self._asked, check)
        told = Validation(base=None, shared=None, dropped=dropped)
        if self._measured:
            good = sorted(found.values(), key=lambda reply: reply.device)
            told = self._measuring.summary(server_round, good, dropped)
        self.validation = told
        values = {name: getattr(told, name) for name in ("base", "shared", "gain", "gain_error")}
        measured = {name: value for name, value in values.items() if value is not None}
        return MetricRecord(measured) if measured else None

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

    def _aggregated(
        self, current: Adapter, trained: list[Adapter], round: int
    ) -> tuple[Aggregated | None, CentralFacts | None]:
        """The next adapter, None to keep the current one, and what the server's noise came to."""
        if self.device_level:
            return self.device_level.close(self._aggregation, current, trained, round=round)
        if not trained:
            return None, None
        aggregated = self._aggregation.aggregate(current, [(adapter, 1.0) for adapter in trained], round=round)
        if self._plan.privacy is None:
            return aggregated, None
        snr = signal_to_spread(changes(trained_layout(self.sites, rank(current), self.frame), current, trained))
        return aggregated._replace(diagnostics=aggregated.diagnostics | ({} if snr is None else {"snr": snr})), None

    def _guarantees(self, spent: float | None, central: CentralFacts | None) -> tuple[Guarantee, ...]:
        """What is promised so far, by whom ever."""
        of_images = (Guarantee(spent, self._plan.privacy.delta),) if self._plan.privacy and spent is not None else ()
        return of_images + ((central.guarantee,) if central else ())

    def _promise(self) -> str:
        """The noise that a run is planned with, in words."""
        said = [f"σ = {self._plan.privacy.noise_multiplier:.3g} a step on devices"] if self._plan.privacy else []
        if level := self.device_level:
            budget, z = level.budget, level.mechanism.noise_multiplier
            solved = f"for ε={budget.epsilon:g} per device (δ={budget.delta:g})"
            said.append(f"σ = {z:.3g} a round on the server, {solved}, {level.mechanism.expected:g} devices expected")
        return ", ".join(said) or "no differential privacy"

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

    def _trained_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """What comes back of a plan of this rank: factors, or cores alone."""
        return core_shapes(self.sites, rank) if self.frame else shapes(self.sites, rank)

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
        tensors = decode(reply.adapter, self._trained_shapes(plan.rank))
        frame = self.frame and head_and_tail(self.frame, plan.rank)[0]
        adapter = between(tensors, frame) if frame else from_tensors(tensors)
        if found := excess(adapter):
            raise RefusedError("norm", f"{reply.device}: {found}")
        return reply, adapter


def _selected(selection: Selection, reports: Mapping[int, DeviceReport], round: int) -> dict[int, DeviceReport]:
    """The nodes that a selection of their devices' names picks, in the order of those names."""
    nodes = {report.device: node for node, report in reports.items()}
    return {nodes[name]: reports[nodes[name]] for name in selection.select(nodes, round=round)}


def _receive(
    kind: str, replies: Iterable[Message], asked: Mapping[int, R], check: Callable[[R, Any], T], *, most: int = 0
) -> tuple[dict[int, T], dict[str, int]]:
    """What passed `check`, by node, and how many did not by reason; one reply for each node that was asked.

    Of an adapter no more than `most` bytes are looked at.
    """
    found: dict[int, T] = {}
    dropped: Counter[str] = Counter()
    heard = 0
    for message in replies:
        heard += 1
        node = message.metadata.src_node_id  # the SuperLink's own for an error about a node that is away
        try:
            if message.has_error():
                error = message.error
                raise RefusedError(_why(error), f"error {error.code}: {_last_line(error.reason)}")
            if node not in asked or node in found:
                raise RefusedError("not asked", "a reply that nobody asked for, or a second one")
            found[node] = check(asked[node], records.reply_from_records(kind, message.content, most=most))
        except Exception as wrong:  # whatever a device sends, the server lives
            reason = wrong.reason if isinstance(wrong, RefusedError) else "malformed"
            dropped["codec" if isinstance(wrong, CodecError) else reason] += 1
            log.warning("%s: reply of node %d dropped: %s", kind, node, wrong)
    if heard < len(asked):
        dropped["no reply"] = len(asked) - heard
    return found, dict(sorted(dropped.items()))


def _why(error: Error) -> str:
    """What an error reply is counted under: a device that says no is no broken one."""
    if (error.reason or "").startswith(records.REFUSED):
        return "refused"
    return _REASONS.get(error.code, "failed")


def _check_origin(report: DeviceReport, device: str) -> None:
    if device != report.device:
        raise RefusedError("impostor", f"node of {report.device} signs as {device[:100]!r}")


def _check_cost(reply: Update | Personalised) -> None:
    if not (0 <= reply.seconds < _MOST and 0 <= reply.joules < _MOST):
        raise RefusedError("malformed", f"{reply.device}: seconds and joules must be 0 to {_MOST:g}")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last_line(text: str | None) -> str:
    """Of a traceback, the line that says what happened, in characters that a terminal doesn't obey."""
    line = ((text or "")[-10_000:].strip().splitlines() or ["no reason given"])[-1][:300]
    return "".join(character if character.isprintable() else "?" for character in line)
