"""A hostile or silent node costs no other node its place in a round, and no round its time limit.

The tests use Flower's own state, object store and request handlers.
"""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.superlink.servicer.fleet import fleet_handlers

from models.lora.adapter import init_adapter
from protocol import records
from protocol.messages import Query
from server.grid.backoff import FIRST, LONGEST, NodeBackoff
from server.rounds.collect import StragglerTracker, collect
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.sync import RoundLimits
from strategies.aggregation.fedit import FedIT
from strategies.clock import WallClock
from strategies.round.request import RoundStart
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, _reply, strategy
from tests.helpers.superlink import FakeNode, SuperLinkHarness

LIMIT = 60.0  # seconds
COST = 0.02  # seconds of a call to the SuperLink


class _FakeTime:
    """Replaces the module `time`: only calls and sleeping take time."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += max(seconds, 1e-3)


@pytest.fixture(autouse=True)
def passing(monkeypatch, link) -> _FakeTime:
    passing = _FakeTime()
    monkeypatch.setattr("server.grid.validating_grid.time", passing)
    monkeypatch.setattr("server.grid.pending_queries.time", passing)
    monkeypatch.setattr("strategies.clock.time", passing)
    monkeypatch.setattr(link, "calls", lambda _: passing.sleep(COST))
    return passing


@pytest.fixture(scope="module")
def link(tmp_path_factory) -> SuperLinkHarness:
    return SuperLinkHarness(tmp_path_factory.mktemp("superlink"))


def content(device: FakeNode) -> RecordDict:
    return RecordDict({"message": ConfigRecord({"text": f"hello from {device.node}"})})


def available(gate, *devices: FakeNode) -> list[str]:
    """Return the names of the devices that are not excluded."""
    nodes = set(gate.get_node_ids())
    return [device.name for device in devices if device.node in nodes]


def queries(*devices: FakeNode) -> list[Message]:
    return [Message(records.request_to_records(Query()), device.node, records.QUERY) for device in devices]


def outcome(replies) -> dict[int, int]:
    """Return the error code of each node's reply; 0: no error."""
    return {reply.metadata.src_node_id: reply.error.code if reply.has_error() else 0 for reply in replies}


def collect_replies(passing, gate, honest, others, *, seconds=LIMIT):
    """Query devices, and return the outcome of replies within a time limit.

    Args:
        passing: the clock.
        gate: the grid.
        honest: devices that answer immediately.
        others: actions of the other devices when they are queries.
        seconds: time limit.
    """
    clock = WallClock()
    replies = collect(gate, queries(*honest, *others), clock, until=clock.now() + seconds)
    pushed = gate.push

    def push(messages, left):
        identifiers = pushed(messages, left)
        for device in honest:
            device.push(device.reply(device.pull(), content(device)))
        for device, action in others.items():
            action(device)
        return identifiers

    gate.push = push
    outcomes = outcome(replies)
    assert passing.passed < seconds + 2.0
    return outcomes


def promise_reply(device: FakeNode) -> None:
    device.push(device.reply(device.pull(), content(device)), objects=0)


def send_half(device: FakeNode) -> None:
    device.push(device.reply(device.pull(), content(device)), objects=2)


def send_large_tree(device: FakeNode) -> None:
    reply = device.reply(device.pull(), content(device))
    names = [ObjectTree(object_id=f"{number:064x}") for number in range(500)]
    device.push(reply, tree=ObjectTree(object_id=reply.object_id, children=names))


def send_other_tree(device: FakeNode) -> None:
    reply = device.reply(device.pull(), content(device))
    device.push(reply, tree=ObjectTree(object_id=reply.object_id))


def stay_silent(device: FakeNode) -> None:
    device.pull()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("action", "code"),
    [
        (promise_reply, 4),
        (send_half, 4),
        (send_large_tree, records.UNREADABLE),
        (send_other_tree, records.UNREADABLE),
        (stay_silent, None),
    ],
)
def test_one_node_costs_others_nothing(link, passing, action, code):
    mallory, *honest = (link.device(name) for name in ("mallory", "ada", "bob"))
    gate = link.grid()
    outcomes = collect_replies(passing, gate, honest, {mallory: action})
    assert outcomes.pop(mallory.node, None) == code
    assert outcomes == {device.node: 0 for device in honest}
    assert available(gate, mallory, *honest) == [*([] if code == 4 else ["mallory"]), "ada", "bob"]


@pytest.mark.integration
def test_silent_node_is_excluded(link, passing):
    """Four times as long as the server waited for it, so that others lose at most a fifth of their time."""
    mallory, ada = link.device("mallory"), link.device("ada")
    gate = link.grid()

    def rounds(count):
        for _ in range(count):
            passing.passed = 0.0
            push = gate.push
            assert collect_replies(passing, gate, [ada], {mallory: stay_silent}) == {ada.node: 0}
            gate.push = push

    rounds(2)
    assert available(gate, mallory, ada) == ["mallory", "ada"]
    assert answer_all(gate, mallory, ada) == {mallory.node: 0, ada.node: 0}
    rounds(2)  # counted from zero since it replied
    assert available(gate, mallory, ada) == ["mallory", "ada"]
    gate._backoff = NodeBackoff(lambda: passing.passed)
    rounds(1)
    assert available(gate, mallory, ada) == ["ada"]
    passing.passed += 4 * LIMIT - 1
    assert available(gate, mallory, ada) == ["ada"]
    passing.passed += 3
    assert available(gate, mallory, ada) == ["mallory", "ada"]


def answer_all(gate, *devices):
    names = gate.push(queries(*devices), 5.0)
    for device in devices:
        device.push(device.reply(device.pull(), content(device)))
    return outcome(reply for _, reply in gate.pull(names, 5.0))


def test_final_poll_takes_arrived_replies(link, passing):
    """Both replies arrived, and the time was over before the first poll."""
    mallory, ada = link.device("mallory"), link.device("ada")
    assert collect_replies(passing, link.grid(), [ada], {mallory: promise_reply}, seconds=0.0) == {
        ada.node: 0,
        mallory.node: 4,
    }


def test_partial_reply_arrives_when_complete(link):
    ada, gate = link.device("ada"), link.grid()
    (name,) = gate.push(queries(ada), 1.0)
    reply = ada.reply(ada.pull(), content(ada))
    send_the_rest = ada.push(reply, objects=1)
    assert list(gate.pull([name], 1.0)) == []
    send_the_rest()
    ((_, reply),) = gate.pull([name], 1.0)
    assert reply.content == content(ada)
    assert list(gate.pull([name], 1.0, last=True)) == []


def test_early_confirmation_is_a_node_failure(link):
    """The SuperLink deletes the message's objects while the ServerApp is still sending them."""
    mallory, ada = link.device("mallory"), link.device("ada")
    gate, first = link.grid(), []

    def early(call):
        if call == "PushObject" and not first:
            first.extend(link.state.get_message_ins(node_id=mallory.node, limit=1))
            link.state.object_store.delete(first[0].metadata.message_id)

    link.calls = early
    names = gate.push(queries(mallory, ada), 5.0)
    assert len(first) == 1
    ada.push(ada.reply(ada.pull(), content(ada)))
    assert outcome(reply for _, reply in gate.pull(names, 1.0)) == {mallory.node: 4, ada.node: 0}


@pytest.mark.integration
def test_poisoned_object_id(tmp_path):
    """Once promised with other children, the id of a Query's content can't be sent again: the SuperLink fails (500)."""
    link = SuperLinkHarness(tmp_path)
    mallory, gate = link.device("mallory"), link.grid()
    (name,) = gate.push(queries(mallory), 1.0)
    message = mallory.pull()
    known = next(iter(message.content.values())).object_id
    gate.forget([name])
    link.state.object_store.delete(message.metadata.message_id)
    reply = mallory.reply(message, content(mallory))
    poison = ObjectTree(object_id=known, children=[ObjectTree(object_id="f" * 64)])
    mallory.push(reply, tree=ObjectTree(object_id=reply.object_id, children=[poison]))
    replies = gate.send_and_receive(queries(mallory), timeout=LIMIT)
    assert outcome(replies) == {mallory.node: 4}
    assert available(gate, mallory) == []


def test_late_replies_are_counted_not_pulled(link):
    ada, gate = link.device("ada"), link.grid()
    late, calls = StragglerTracker(gate), []
    late.add(gate.push(queries(ada), 1.0), round=1)
    assert late.count(round=2) == 0
    ada.push(ada.reply(ada.pull(), content(ada)), objects=0)
    link.calls = calls.append
    assert late.count(round=2) == 1
    assert "PullObject" not in calls
    assert late.count(round=3) == 0


@pytest.mark.parametrize("seconds", [0.5, 10.0, 3600.0])
def test_unresponsive_superlink_does_not_block_a_round(link, passing, seconds):
    devices, gate = [link.device(name) for name in "abc"], link.grid()

    def time_out(_call):
        passing.sleep(gate._calls._client._client.timeout.read)
        raise httpx.ReadTimeout("nothing came")

    names = gate.push(queries(*devices), 1.0)
    link.calls = time_out
    gate.push = lambda _messages, _seconds: names
    passing.passed = 0.0
    clock = WallClock()
    assert list(collect(gate, [], clock, until=seconds)) == []
    assert seconds <= passing.passed < seconds + 2.0
    gate = link.grid()
    passing.passed = 0.0
    assert outcome(collect(gate, queries(*devices), clock, until=seconds)) == {device.node: 4 for device in devices}
    assert passing.passed < seconds + 2.0
    link.calls = lambda _: None
    assert available(gate, *devices) == ["a", "b", "c"]  # no node was to blame


def test_unavailable_superlink_blames_no_node(link):
    ada, gate = link.device("ada"), link.grid()
    (name,) = gate.push(queries(ada), 1.0)
    ada.push(ada.reply(ada.pull(), content(ada)))
    down = 5

    def refused(_call):
        nonlocal down
        down -= 1
        if down > 0:
            raise httpx.ConnectError("refused")

    link.calls = refused
    assert list(gate.pull([name], 1.0)) == []
    assert outcome(pull_reply(gate, name)) == {ada.node: 0}
    assert available(gate, ada) == ["ada"]


def pull_reply(gate, name):
    for _ in range(10):
        if replies := [reply for _, reply in gate.pull([name], 1.0)]:
            return replies
    raise AssertionError("nothing came")


def test_late_query_answer_comes_with_later_call(link, passing):
    ada, slow, gate = link.device("ada"), link.device("slow"), link.grid()
    for message in queries(ada, slow):
        gate._queries._pending[message.metadata.dst_node_id] = gate.push([message], 1.0)[0], passing.monotonic()
    ada.push(ada.reply(ada.pull(), content(ada)))
    assert outcome(gate.query_nodes([], timeout=60.0, wait=0.0)) == {ada.node: 0}
    assert outcome(gate.query_nodes(queries(slow), timeout=60.0, wait=0.0)) == {}  # it isn't queried again
    slow.push(slow.reply(slow.pull(), content(slow)))
    assert outcome(gate.query_nodes(queries(slow), timeout=60.0, wait=0.0)) == {slow.node: 0}


def test_unanswered_query_excludes_node(link):
    ada, gate = link.device("ada"), link.grid()
    assert outcome(gate.query_nodes(queries(ada), timeout=0.05, wait=1.0)) == {}
    assert available(gate, ada) == []


def test_backoff_doubles_and_ends():
    time = 0.0
    backoff = NodeBackoff(lambda: time)
    assert [backoff.add(1) for _ in range(8)] == [FIRST * 2**n for n in range(6)] + [LONGEST] * 2
    assert backoff.available([1, 2]) == [2]
    time = LONGEST
    assert backoff.available([1, 2]) == [1, 2]
    backoff.add(1)
    backoff.clear(1)
    assert backoff.available([1]) == [1]
    assert backoff.add(1) == FIRST


def test_names_are_registered_names(link):
    devices, gate = [link.device(name) for name in "ab"], link.grid()
    assert available(gate, *devices) == ["a", "b"]
    assert {device.node: device.name for device in devices}.items() <= gate.names().items()


def test_node_cannot_choose_a_name_by_leaving(link, caplog):
    """A node leaves after the listing, when it could claim any name, and returns to answer the query."""
    mallory, gate, federated = link.device("mallory"), link.grid(), strategy()
    get_node_ids, pushed = gate.get_node_ids, gate.push

    def leaves():
        nodes = [node for node in get_node_ids() if node == mallory.node]
        assert link.state.deactivate_node(mallory.node)
        return nodes

    def push(messages, seconds):
        assert link.state.activate_node(mallory.node, 30.0)
        identifiers = pushed(messages, seconds)
        report = replace(REPORT, device="ada", base=PLAN.base)
        mallory.push(mallory.reply(mallory.pull(), records.reply_to_records(report)))
        return identifiers

    gate.get_node_ids, gate.push = leaves, push
    assert federated.query(gate) == {}
    assert "reports the name 'ada', is rejected: its key was registered as 'mallory'" in caplog.text


@pytest.mark.integration
def test_fedbuff_round_ends_in_time(link, passing):
    """One promises a reply and never sends it, one is silent, one is honest; each round ends with the honest update."""
    mallory, silent, ada = (link.device(name) for name in ("mallory", "silent", "ada"))
    gate, federated = link.grid(), strategy(aggregation=FedIT())
    gate.names = lambda: {device.node: device.name for device in (mallory, silent, ada)}
    for device in (mallory, silent, ada):
        federated.cohort.devices.update_report(device.node, replace(REPORT, device=device.name), now=0.0)
    reports = federated.cohort.devices.reports
    federated.cohort.query = lambda _: {n: report for n, report in reports.items() if n in gate.get_node_ids()}
    limits = RoundLimits(clock=WallClock(), timeout=LIMIT)
    round_runner = FedBuffRunner(gate, federated, limits, size=3, concurrency=3)
    pushed, adapter = gate.push, init_adapter(SITES, PLAN.rank, seed=0)

    def push(messages, left):
        messages = list(messages)
        identifiers = pushed(messages, left)
        for message in messages:
            if message.metadata.dst_node_id == mallory.node:
                promise_reply(mallory)
            elif message.metadata.dst_node_id == ada.node:
                request = ada.pull()
                train = records.request_from_records("train", request.content)
                ada.push(ada.reply(request, records.reply_to_records(_reply(train, FakeDevice("ada")))))
        return identifiers

    gate.push = push
    for number in (1, 2):
        passing.passed = 0.0
        result = round_runner.train(RoundStart(number=number, adapter=adapter))
        assert passing.passed < LIMIT + 2.0
        assert result.adapter is not None
        assert result.metrics.replied >= 1


def test_unpulled_messages_are_deleted(link):
    ada, gate = link.device("ada"), link.grid()
    (name,) = gate.push(queries(ada), 1.0)
    assert name in link.state.object_store
    gate.forget([name])
    assert available(gate, ada) == ["ada"]
    assert name not in link.state.object_store, "before the next round"
    pulled = fleet_handlers.pull_messages(
        PullMessagesRequest(node=Node(node_id=ada.node)), link.state, link.state.object_store
    )
    assert not pulled.messages_list, "a node that pulls again doesn't get it"
    (again,) = gate.push(queries(ada), 1.0)
    ada.push(ada.reply(ada.pull(), content(ada)))
    assert outcome(reply for _, reply in gate.pull([again], 1.0)) == {ada.node: 0}
