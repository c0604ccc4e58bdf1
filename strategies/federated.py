"""Flower's Strategy, composed of an aggregation, a selection and a planner.

Here are the legs of a round in Flower's terms. Who is there is in `strategies.roster`, what is let in of their replies
in `strategies.replies`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from models.adapter import Adapter, Sites, from_tensors, rank, shapes, to_tensors
from models.bounds import excess
from models.controls import beside
from models.cores import from_trained_tensors, to_framed_tensors, trained_tensors
from models.slots import trained_layout
from privacy.accounting import PoissonGaussian
from privacy.snr import signal_to_spread
from protocol import records, rounding
from protocol.codec import decode, encode
from protocol.messages import (
    DeviceReport,
    Evaluate,
    Personalise,
    Query,
    Reply,
    Request,
    Rounded,
    Train,
    TrainingPlan,
    Update,
)
from strategies.aggregation import Aggregated, Aggregation, Updates
from strategies.download import FP32, download, lost, restored
from strategies.facts import CentralFacts, DeviceFacts, PersonalFacts, TrainFacts, Validation, train_facts
from strategies.measuring import Measuring
from strategies.optimisers import Memory, Optimiser
from strategies.planning import Cosine, Limits, plan_for
from strategies.private import DeviceLevel, changes
from strategies.replies import Checks, Heard, failure, receive
from strategies.roster import Roster, selected
from strategies.scaffold import Drift
from strategies.selection import Selection
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
from strategies.spool import Spool

log = logging.getLogger(__name__)

_CONTROL = "control"  # part of the memory

_QUERY_TIMEOUT = 120.0  # seconds: a device starts a process to answer


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What was sent for training, to hold the replies against."""

    adapter: Adapter
    plans: Mapping[int, tuple[DeviceReport, TrainingPlan]]
    bytes_down: int
    drift: Drift | None
    """Of devices that correct for it."""
    lost: Mapping[str, Tensor]
    """What rounding took of the adapter on its way, for the next one."""


class Federated(Strategy):
    """The strategy of a run.

    Args:
        plan: what a device without limits is asked to do each round; its `round` is replaced.
        sites: where adapters sit in the base that `plan` names.
        selection: who is asked to train in a round.
        evaluation: who is asked to measure the adapter after it (default: every device).
        measuring: after which rounds, and what hides whom in the result (default: after each, openly; in a private run
            after none).
        optimiser: takes the step that a round's mean points to; None: the mean is the next adapter.
        download: precision that adapters are sent in.
        frame: the factors that stay, of a plan that trains cores between them.
        decay: of the plan's learning rate (default: it stays).
        accept_simulated: also take private updates made with reproducible noise, which are no releases: for tests
            and simulations only.
        device_level: clips and noises what devices send; None: their updates are aggregated as they are.

    `memory` is what the server's optimiser remembers after the last round; whoever goes on with a run sets it. After
    each leg, `trained`, `validation` and `personalised` hold its facts.
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
        optimiser: Optimiser | None = None,
        download: str = FP32,
        frame: Adapter | None = None,
        decay: Cosine | None = None,
        accept_simulated: bool = False,
        device_level: DeviceLevel | None = None,
    ) -> None:
        if plan.cores != (frame is not None):
            raise ValueError("a plan that trains cores needs their frame, and no other does")
        if not 0 < plan.keep <= 1 or (plan.keep < 1 and not plan.feedback):
            raise ValueError("keep: over 0 and at most 1, and less than 1 only with feedback")
        if plan.feedback and not aggregation.sensitivity.linear:
            raise ValueError(f"feedback needs directions that keep their meaning: {aggregation.sensitivity.reason}")
        if plan.scaffold and (device_level or plan.optimiser != "sgd" or not aggregation.sensitivity.linear):
            raise ValueError("scaffold: for plain SGD and a mean of factors, and not under privacy per device")
        if download != FP32 and (frame or plan.scaffold):
            raise ValueError("download: what travels beside an adapter is sent whole, and so is the adapter")
        if optimiser and aggregation.sensitivity.turned:
            raise ValueError(f"an optimiser needs directions that stay the same: {aggregation.sensitivity.turned}")
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
        self._optimiser, self._download = optimiser, download
        self.memory: Memory = {}
        self._checks = Checks(sites=sites, frame=frame, accept_simulated=accept_simulated, measuring=measuring)
        self._roster = Roster(plan.base)
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
        if unknown := self._roster.unknown(set(grid.get_node_ids())):
            replies = grid.send_and_receive([self._message(Query(), node) for node in unknown], timeout=_QUERY_TIMEOUT)
            heard = _heard(records.QUERY, replies)
            found, _ = receive(records.QUERY, heard, dict.fromkeys(unknown), lambda _, reply: reply)
            for node, report in sorted(found.items()):
                self._roster.consider(node, report)
        return dict(self._roster.reports)

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
        held = from_tensors(decode(records.adapter_from_record(arrays), shapes(self.sites, -1)))
        data, adapter, rounded = download(held, self._download)
        drift = None
        if self._plan.scaffold:
            start = trained_tensors(adapter, self.frame)
            drift = Drift(self.memory.get(_CONTROL), start, devices=len(reports))
        if self.frame or drift:  # what is beside the adapter is sent whole, and so is the adapter
            tensors = to_framed_tensors(adapter, self.frame) if self.frame else to_tensors(adapter)
            data = encode(tensors | (beside(drift.control) if drift else {}))
        full = replace(self._plan, round=server_round, rank=min(self._plan.rank, rank(adapter)))
        if self._decay:
            full = replace(full, learning_rate=self._decay(full.learning_rate, server_round))
        numbers = sum(site.inputs + site.outputs for site in self.sites.values())
        if self.frame:
            numbers = len(self.sites) * full.rank
        upload = numbers * (4.0 if full.update == "fp32" else rounding.bytes_per_number(full.update, full.keep))
        plans = {
            node: (report, plan_for(report, full, self._limits, download=len(data), upload_per_rank=upload))
            for node, report in selected(self._selection, reports, server_round).items()
        }
        if self.device_level:
            self.device_level.open(server_round, [report.device for report, _ in plans.values()], data)
        self._round = _Round(
            adapter=adapter,
            plans=plans,
            bytes_down=len(data) * len(plans),
            drift=drift,
            lost={} if rounded is None or self._aggregation.sensitivity.turned else lost(held, adapter),
        )
        return [
            self._message(
                Train(plan=plan, adapter=data, rounded=rounded, echo=self._events.get(report.device, 0)), node
            )
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
        with Spool() as spool:
            return self._aggregate(self._round, replies, spool, server_round)

    def _aggregate(
        self, asked: _Round, replies: Iterable[Message], spool: Spool, server_round: int
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        most = max((self._checks.largest(plan) for _, plan in asked.plans.values()), default=0)
        heard = _heard(records.TRAIN, replies, most=most)
        sizes: dict[str, int] = {}

        def take_in(sent: tuple[DeviceReport, TrainingPlan], reply: Update) -> Update:
            update, adapter = self._checks.update(asked.adapter, sent, reply)
            spool.add(update.device, adapter)
            sizes[update.device] = len(update.adapter)
            return replace(update, adapter=b"")  # it is on disk

        found, dropped = receive(records.TRAIN, heard, asked.plans, take_in)
        updates = sorted(found.values(), key=lambda update: update.device)
        aggregated, central = self._aggregated(asked, spool, server_round)
        diagnostics = aggregated.diagnostics if aggregated else {}
        arrays = metrics = None
        plans = {report.device: plan for report, plan in asked.plans.values()}
        if aggregated and asked.drift:
            for name, (adapter, _) in zip(spool.names, spool, strict=True):
                asked.drift.add(plans[name], trained_tensors(adapter, self.frame))
            self.memory = {**self.memory, _CONTROL: asked.drift.next()}
        if aggregated:
            arrays = records.adapter_to_record(encode(to_tensors(aggregated.adapter)))
            metrics = MetricRecord({"replied": len(updates), **diagnostics})
        else:
            good = f"{len(updates)} good replies of {len(asked.plans)}"
            log.warning("round %d: keeping the adapter: %s", server_round, good)
        self.trained = train_facts(
            updates,
            plans=plans,
            bytes_down=asked.bytes_down,
            bytes_up=sizes,
            dropped=dropped,
            private=self._plan.privacy,
            central=central,
            diagnostics=diagnostics,
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
        data, rounded = self._down(records.adapter_from_record(arrays))
        self._measured = self.measures(server_round) and self._paid(server_round, data)
        self._asked = selected(self._evaluation, self.query(grid), server_round) if self._measured else {}
        private = self._measuring.among_pictures
        return self._ask(
            Evaluate(run=self._plan.run, round=server_round, adapter=data, rounded=rounded, privacy=private)
        )

    def _down(self, whole: bytes) -> tuple[bytes, Rounded | None]:
        """What travels of an adapter, and how it is to be read."""
        if self._download == FP32:
            return whole, None
        data, _, rounded = download(from_tensors(decode(whole, shapes(self.sites, -1))), self._download)
        return data, rounded

    def _paid(self, round: int, adapter: bytes) -> bool:
        """Whether a measurement that the server noises is charged for; devices charge for their own."""
        hidden = self._measuring.among_devices
        if not (self.device_level and hidden):
            return True
        mechanism = PoissonGaussian(noise_multiplier=hidden.noise_multiplier, sampling_rate=1.0, steps=1)
        return self.device_level.pays_for(round, adapter, mechanism, clip=hidden.clip, expected=float(hidden.devices))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean validation losses of the base and of the adapter, or a noised gain; None when there is neither."""
        check = partial(self._checks.evaluation, server_round)
        found, dropped = receive(records.EVALUATE, _heard(records.EVALUATE, replies), self._asked, check)
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
        data, rounded = self._down(request.adapter)
        request = replace(request, adapter=data, rounded=rounded)
        self._asked = self.query(grid)
        if names is not None:
            self._asked = {node: report for node, report in self._asked.items() if report.device in names}
        return self._ask(request)

    def aggregate_personalise(self, replies: Iterable[Message]) -> PersonalFacts:
        """Who has a personal adapter now, and what it cost."""
        heard = _heard(records.PERSONALISE, replies)
        found, dropped = receive(records.PERSONALISE, heard, self._asked, self._checks.personalised)
        done = sorted(found.values(), key=lambda reply: reply.device)
        self.personalised = PersonalFacts(
            asked=len(self._asked),
            devices=tuple(reply.device for reply in done),
            dropped=dropped,
            seconds=max((reply.seconds for reply in done), default=0.0),
            joules=sum(reply.joules for reply in done),
        )
        return self.personalised

    def _aggregated(self, asked: _Round, updates: Updates, round: int) -> tuple[Aggregated | None, CentralFacts | None]:
        """The next adapter, None to keep the current one, and what the server's noise came to."""
        current = asked.adapter
        if self.device_level:
            trained = (adapter for adapter, _ in updates)
            noised, central = self.device_level.close(self._aggregation, current, trained, round=round)
            noised, self.memory = self._stepped(current, noised, asked.lost)
            return noised, central
        if not updates:
            return None, None
        mean = self._aggregation.aggregate(current, updates, round=round)
        aggregated, memory = self._stepped(current, mean, asked.lost)
        if found := excess(aggregated.adapter):  # of updates that were each let in
            log.warning("round %d: keeping the adapter, since devices would refuse the next: %s", round, found)
            return None, None
        self.memory = memory
        if self._plan.privacy is None:
            return aggregated, None
        layout = trained_layout(self.sites, rank(current), self.frame)
        snr = signal_to_spread(changes(layout, current, (adapter for adapter, _ in updates)))
        return aggregated._replace(diagnostics=aggregated.diagnostics | ({} if snr is None else {"snr": snr})), None

    def _stepped(
        self, current: Adapter, aggregated: Aggregated, lost: Mapping[str, Tensor]
    ) -> tuple[Aggregated, Memory]:
        """The step that the server makes of a round, from where it really stood, and what it is going to remember."""
        if self._optimiser is None:
            return aggregated._replace(adapter=restored(aggregated.adapter, lost)), self.memory
        before, after = (trained_tensors(adapter, self.frame) for adapter in (current, aggregated.adapter))
        found, memory = self._optimiser.step(before, after, self.memory)
        stepped = restored(from_trained_tensors(found, self.frame), lost)
        return aggregated._replace(adapter=stepped), {**self.memory, **memory}

    def _promise(self) -> str:
        """The noise that a run is planned with, in words."""
        said = [f"σ = {self._plan.privacy.noise_multiplier:.3g} a step on devices"] if self._plan.privacy else []
        if level := self.device_level:
            budget, z = level.budget, level.mechanism.noise_multiplier
            solved = f"for ε={budget.epsilon:g} per device (δ={budget.delta:g})"
            said.append(f"σ = {z:.3g} a round on the server, {solved}, {level.mechanism.expected:g} devices expected")
        return ", ".join(said) or "no differential privacy"

    def _ask(self, request: Request) -> Iterable[Message]:
        return [self._message(request, node) for node in self._asked]

    def _message(self, request: Request, node: int) -> Message:
        return Message(records.request_to_records(request), node, records.message_type(request))


def _heard(kind: str, replies: Iterable[Message], *, most: int = 0) -> Iterator[Heard]:
    """Who sent each message, and what reads it: of an adapter no more than `most` bytes are looked at."""
    for message in replies:
        error = message.error if message.has_error() else None
        read = failure(error.code, error.reason) if error else partial(_read, kind, message, most)
        yield message.metadata.src_node_id, read


def _read(kind: str, message: Message, most: int) -> Reply:
    return records.reply_from_records(kind, message.content, most=most)
