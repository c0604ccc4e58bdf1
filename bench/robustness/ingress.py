"""Entry points of messages, which map attacks to outcomes.

A reply passes through all of a server's checks up to the aggregation: the validating grid around Flower's, records,
messages, codec and the strategy's validation. A request passes through all of a device's checks up to the first job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from bench.robustness.attack_corpus import Delivery, MessageAttack, WireMessage
from bench.robustness.invariants import ExpectedMessage, parse, violations
from client.data import Pictures
from client.device import Device
from client.rounds.handler import handle
from client.runtime.client_app import parse_request
from client.store.store import Store
from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, Sites, adapter_shapes, init_adapter, to_tensors
from privacy.noise import SecureNoise
from privacy.policy import Policy
from privacy.storage import FileStorage
from protocol import messages, records
from protocol.tensor_codec import encode, max_payload
from server.grid.validating_grid import ValidatingGrid
from simulations.grid.cohort import InProcessGrid, set_message_id
from strategies.aggregation import Aggregated, Linearity, Updates, in_every_round
from strategies.cohort import CohortRule
from strategies.download import AdapterFormat
from strategies.flower_strategy import FlowerStrategy
from strategies.phases.evaluation import EvaluationRule
from strategies.round.messages import to_messages
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.selection.everyone import Everyone
from strategies.server_update import ServerUpdate
from training.jobs import Picture

ACCEPTED = "accepted"
NODE, ROUND = 1, 3
MEASURING = messages.EvaluationPrivacy(noise_multiplier=10.0, clip=0.1, pictures=5, delta=1e-3)
PLAN = messages.TrainingPlan(
    run="run",
    round=ROUND,
    base="b" * 64,
    rank=1,
    steps=2,
    batch_size=4,
    learning_rate=0.1,
    privacy=messages.ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3),
)
REPORT = messages.DeviceReport(
    device="d",
    base=PLAN.base,
    profile="pi4_4gb",
    memory_gib=4.0,
    examples_per_second=6.0,
    watts=6.4,
    uplink_mbps=8.0,
    downlink_mbps=40.0,
)


class PendingAttack(NamedTuple):
    """Attack that is ready to be delivered."""

    deliver: Callable[[], str]
    """Function that delivers the attack, which is measured. Returns `accepted`, the reason of the refusal, or
    `crash …`."""
    violated: Callable[[], list[str]]
    """Function that lists the invariants that the accepted message violates."""


class Ingress(NamedTuple):
    """Honest message of one type, and a function that prepares an attack on its receiver."""

    honest: WireMessage
    open: Callable[[MessageAttack], PendingAttack]


def ingresses(sites: Sites, *, rank: int, folder: Path) -> dict[str, Ingress]:
    """Return an entry point for each message type, by the name of the type.

    Args:
        sites: sites of the adapters.
        rank: rank of the adapters.
        folder: the device's storage.
    """
    adapter_factors = init_adapter(sites, rank, seed=0)
    adapter = encode(
        to_tensors({name: Factors(a, torch.full_like(b, 0.01)) for name, (a, b) in adapter_factors.items()})
    )
    return _Server(sites, rank, adapter).ingresses() | _Device(sites, rank, adapter, folder).ingresses()


class _OneNodeGrid(InProcessGrid):
    """A grid with one node, which answers a query honestly and any other message with `deliver`."""

    def __init__(self) -> None:
        super().__init__()
        self.deliver: Delivery | None = None
        self.content: object = None
        self._asked: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [NODE]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed: list[str] = []
        for message in messages:
            set_message_id(message, f"{len(pushed)}")
            self._asked[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (request,) = (self._asked.pop(identifier) for identifier in message_ids)
        if self.deliver is None:
            return [Message(records.reply_to_records(REPORT), reply_to=request)]
        reply = self.deliver()
        self.content = reply.content if reply.has_content() else None
        return [reply]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("the gate pushes and pulls")


class _RecordingRule:
    """An aggregation rule that stores the update that reached it."""

    mixed_ranks = True
    stable_factors = False
    sensitivity = Linearity(linear=False, reason="it reads only one update")
    trains = staticmethod(in_every_round("both"))

    def __init__(self) -> None:
        self.update: Adapter | None = None

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        ((self.update, _),) = updates
        return Aggregated(current, {})


class _Server:
    """The strategy of a run with one device."""

    def __init__(self, sites: Sites, rank: int, adapter: bytes) -> None:
        self._plan, self._sites, self._adapter = replace(PLAN, rank=rank), sites, adapter
        self._arrays = records.adapter_to_record(adapter)
        self._line, self._rule = _OneNodeGrid(), _RecordingRule()
        self._gate = ValidatingGrid(self._line, largest=max_payload(adapter_shapes(sites, rank)), poll=0.0)
        self._request = set_message_id(Message(records.request_to_records(messages.Query()), NODE, records.QUERY), "0")

    def ingresses(self) -> dict[str, Ingress]:
        """Return an entry point for each type of reply."""
        origin: dict[str, object] = {"device": REPORT.device}
        replies: list[
            tuple[messages.Reply, dict[str, object], Callable[[FlowerStrategy], Callable[[], dict[str, int]]]]
        ] = [
            (
                messages.Update(
                    device=REPORT.device,
                    run=PLAN.run,
                    round=ROUND,
                    rank=self._plan.rank,
                    adapter=self._adapter,
                    release=True,
                    seconds=1.0,
                    joules=2.0,
                    quality="estimate",
                    loss=None,
                    epsilon=1.0,
                    events=3,
                ),
                origin | {"run": PLAN.run, "round": ROUND, "rank": self._plan.rank, "release": True},
                self._train,
            ),
            (
                messages.Evaluation(device=REPORT.device, round=ROUND, base=None, shared=None, gain=-0.1, epsilon=1.0),
                origin | {"round": ROUND, "base": None, "shared": None, "release": True},
                self._evaluate,
            ),
            (
                messages.Personalized(device=REPORT.device, seconds=1.0, joules=2.0, quality="measured"),
                origin,
                self._personalize,
            ),
            (REPORT, {"base": PLAN.base}, self._query),
        ]
        return {type(reply).__name__: self._ingress(reply, exact, phase) for reply, exact, phase in replies}

    def _ingress(
        self,
        reply: messages.Reply,
        exact: dict[str, object],
        phase: Callable[[FlowerStrategy], Callable[[], dict[str, int]]],
    ) -> Ingress:
        expected = _expected(reply, self._sites, self._plan.rank, exact)

        def prepare_attack(attack: MessageAttack) -> PendingAttack:
            self._line.deliver = None
            strategy = FlowerStrategy(
                plan=self._plan,
                format=AdapterFormat(sites=self._sites),
                update=ServerUpdate(aggregation=self._rule),
                cohort=CohortRule(selection=Everyone()),
                evaluation=EvaluationRule(policy=EvaluationPolicy(local_noise=MEASURING)),
            )
            receive = phase(strategy)
            self._line.deliver, self._line.content, self._rule.update = attack.prepare(self._request), None, None

            def deliver() -> str:
                try:
                    dropped = receive()
                except Exception as error:
                    return f"crash {type(error).__name__}"
                return next(iter(dropped), ACCEPTED)

            return PendingAttack(deliver, lambda: violations(self._line.content, expected) + self._differences())

        return Ingress(_wire_message(reply), prepare_attack)

    def _differences(self) -> list[str]:
        """List differences between the aggregated adapter and an independent reading of the message."""
        if self._rule.update is None:
            return []
        content: Any = self._line.content
        read = parse(content["arrays"]["adapter"].data)
        update = to_tensors(self._rule.update)
        tiny = np.finfo(np.float32).tiny
        same = update.keys() == read.keys() and all(
            np.array_equal(update[name].numpy(), np.where(np.abs(read[name]) < tiny, 0, read[name])) for name in read
        )
        return [] if same else ["the aggregated adapter is not the sent one with subnormal numbers as 0"]

    def _train(self, strategy: FlowerStrategy) -> Callable[[], dict[str, int]]:
        requests = list(strategy.configure_train(ROUND, self._arrays, ConfigRecord(), self._gate))

        def receive() -> dict[str, int]:
            strategy.aggregate_train(ROUND, self._gate.send_and_receive(requests))
            return strategy.trained.dropped if strategy.trained else {}

        return receive

    def _evaluate(self, strategy: FlowerStrategy) -> Callable[[], dict[str, int]]:
        requests = list(strategy.configure_evaluate(ROUND, self._arrays, ConfigRecord(), self._gate))

        def receive() -> dict[str, int]:
            strategy.aggregate_evaluate(ROUND, self._gate.send_and_receive(requests))
            return strategy.validation.dropped if strategy.validation else {}

        return receive

    def _personalize(self, strategy: FlowerStrategy) -> Callable[[], dict[str, int]]:
        request = strategy.personalization.request(_personalize(self._adapter, self._plan.rank), self._gate)
        messages = to_messages(request.messages)
        return lambda: strategy.personalization.finish(request, self._gate.send_and_receive(messages)).dropped

    def _query(self, strategy: FlowerStrategy) -> Callable[[], dict[str, int]]:
        return lambda: {} if strategy.query(self._gate) else {"refused": 1}


class _Device:
    """A device that receives requests of a server."""

    def __init__(self, sites: Sites, rank: int, adapter: bytes, folder: Path) -> None:
        self._rank, self._adapter = rank, adapter
        picture = Picture(np.zeros((8, 8), np.uint8), "a")
        self._device = Device(
            name=REPORT.device,
            report=REPORT,
            store=Store(FileStorage(folder)),
            pictures=lambda: Pictures((picture,), (picture,), (picture,)),
            sites=sites,
            policy=Policy(max_rank=2 * rank),
            noise=lambda _round, _purpose: SecureNoise(),
            seed=0,
            resolution=8,
        )

    def ingresses(self) -> dict[str, Ingress]:
        """Return an entry point for each type of request."""
        requests: list[tuple[messages.Request, dict[str, object]]] = [
            (messages.Train(plan=replace(PLAN, rank=self._rank), adapter=self._adapter), {"plan.base": PLAN.base}),
            (messages.Evaluate(run=PLAN.run, round=ROUND, adapter=self._adapter), {}),
            (_personalize(self._adapter, self._rank), {}),
            (messages.Query(), {}),
        ]
        return {type(request).__name__: self._ingress(request, exact) for request, exact in requests}

    def _ingress(self, request: messages.Request, exact: dict[str, object]) -> Ingress:
        expected = _expected(request, self._device.sites, self._device.policy.max_rank, exact)
        message = Message(RecordDict(), NODE, records.message_type(request))
        max_bytes = max_payload(adapter_shapes(self._device.sites, -1), free=self._device.policy.max_rank)

        def prepare_attack(attack: MessageAttack) -> PendingAttack:
            delivery = attack.prepare(message)
            received: list[Message] = []

            def deliver() -> str:
                try:
                    received.append(delivery())
                    next(handle(parse_request(received[0], max_bytes=max_bytes), self._device))
                except StopIteration:  # a query has no job
                    return ACCEPTED
                except AntherError as error:
                    return type(error).__name__
                except Exception as error:
                    return f"crash {type(error).__name__}"
                return ACCEPTED

            return PendingAttack(deliver, lambda: violations(received[0].content, expected))

        return Ingress(_wire_message(request), prepare_attack)


def _personalize(adapter: bytes, rank: int) -> messages.Personalize:
    return messages.Personalize(
        run=PLAN.run,
        round=ROUND,
        adapter=adapter,
        rank=rank,
        steps=2,
        batch_size=4,
        learning_rate=0.1,
        look_every=1,
        patience=1,
    )


def _wire_message(message: messages.Request | messages.Reply) -> WireMessage:
    return WireMessage(messages.to_json(message), messages.payloads(message).get("adapter"))


def _expected(
    message: messages.Request | messages.Reply, sites: Sites, max_rank: int, exact: dict[str, object]
) -> ExpectedMessage:
    sizes = {name: (site.inputs, site.outputs) for name, site in sites.items()}
    return ExpectedMessage(type(message).__name__, sizes, max_rank, exact)
