"""What one node does, or doesn't, costs no other node its place in a round, nor the round its time limit.

Against Flower's own state, object store and request handlers.
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

from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import Query
from protocol.tensor_codec import encode
from server.grid.pauses import FIRST, LONGEST, NodeBackoff
from server.rounds.collect import StragglerTracker, collect
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.sync import RoundLimits
from strategies.aggregation.fedit import FedIT
from strategies.clock import WallClock
from strategies.fedbuff import REBASES
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, _reply, strategy
from tests.helpers.superlink import FakeNode, SuperLinkHarness

LIMIT = 60.0  # seconds
COST = 0.02  # seconds of a call to the SuperLink


class Time:
    """In place of the module: calls and sleeping take time, and nothing else does."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += max(seconds, 1e-3)


@pytest.fixture(autouse=True)
def passing(monkeypatch, link) -> Time:
    passing = Time()
    monkeypatch.setattr("server.grid.validating_grid.time", passing)
    monkeypatch.setattr("server.grid.inquiries.time", passing)
    monkeypatch.setattr("strategies.clock.time", passing)
    monkeypatch.setattr(link, "calls", lambda _: passing.sleep(COST))
    return passing


@pytest.fixture(scope="module")
def link(tmp_path_factory) -> SuperLinkHarness:
    return SuperLinkHarness(tmp_path_factory.mktemp("superlink"))


def content(device: FakeNode) -> RecordDict:
    return RecordDict({"message": ConfigRecord({"text": f"hello from {device.node}"})})


def there(gate, *devices: FakeNode) -> list[str]:
    """Names of those among them that may be asked."""
    nodes = set(gate.get_node_ids())
    return [device.name for device in devices if device.node in nodes]


def asked(*devices: FakeNode) -> list[Message]:
    return [Message(records.request_to_records(Query()), device.node, records.QUERY) for device in devices]


def outcome(replies) -> dict[int, int]:
    """Error code of each node's reply; 0: none."""
    return {reply.metadata.src_node_id: reply.error.code if reply.has_error() else 0 for reply in replies}


def answering(passing, gate, honest, others, *, seconds=LIMIT):
    """Replies within so many seconds to what is asked of all of them.

    Args:
        honest: devices that answer at once.
        others: what each of the others does instead, once it was asked.
    """
    clock = WallClock()
    replies = collect(gate, asked(*honest, *others), clock, until=clock.now() + seconds)
    pushed = gate.push

    def push(messages, left):
        identifiers = pushed(messages, left)
        for device in honest:
            device.push(device.reply(device.pull(), content(device)))
        for device, does in others.items():
            does(device)
        return identifiers

    gate.push = push
    found = outcome(replies)
    assert passing.passed < seconds + 2.0
    return found


def promises(device: FakeNode) -> None:
    device.push(device.reply(device.pull(), content(device)), objects=0)


def sends_half(device: FakeNode) -> None:
    device.push(device.reply(device.pull(), content(device)), objects=2)


def sends_a_forest(device: FakeNode) -> None:
    reply = device.reply(device.pull(), content(device))
    names = [ObjectTree(object_id=f"{number:064x}") for number in range(500)]
    device.push(reply, tree=ObjectTree(object_id=reply.object_id, children=names))


def sends_another_tree(device: FakeNode) -> None:
    reply = device.reply(device.pull(), content(device))
    device.push(reply, tree=ObjectTree(object_id=reply.object_id))


def is_silent(device: FakeNode) -> None:
    device.pull()


@pytest.mark.parametrize(
    ("does", "code"),
    [
        (promises, 4),
        (sends_half, 4),
        (sends_a_forest, records.UNREADABLE),
        (sends_another_tree, records.UNREADABLE),
        (is_silent, None),
    ],
)
def test_one_node_costs_the_others_nothing(link, passing, does, code):
    mallory, *honest = (link.device(name) for name in ("mallory", "ada", "bob"))
    gate = link.grid()
    found = answering(passing, gate, honest, {mallory: does})
    assert found.pop(mallory.node, None) == code
    assert found == {device.node: 0 for device in honest}
    assert there(gate, mallory, *honest) == [*([] if code == 4 else ["mallory"]), "ada", "bob"]


def test_who_is_silent_again_and_again_is_left_out(link, passing):
    """For four times as long as it was waited for, so that others lose a fifth of their time at most."""
    mallory, ada = link.device("mallory"), link.device("ada")
    gate = link.grid()

    def rounds(count):
        for _ in range(count):
            passing.passed = 0.0
            push = gate.push
            assert answering(passing, gate, [ada], {mallory: is_silent}) == {ada.node: 0}
            gate.push = push

    rounds(2)
    assert there(gate, mallory, ada) == ["mallory", "ada"]
    assert answering_all(gate, mallory, ada) == {mallory.node: 0, ada.node: 0}
    rounds(2)  # counted anew since it replied
    assert there(gate, mallory, ada) == ["mallory", "ada"]
    gate._backoff = NodeBackoff(lambda: passing.passed)
    rounds(1)
    assert there(gate, mallory, ada) == ["ada"]
    passing.passed += 4 * LIMIT - 1
    assert there(gate, mallory, ada) == ["ada"]
    passing.passed += 3
    assert there(gate, mallory, ada) == ["mallory", "ada"]


def answering_all(gate, *devices):
    names = gate.push(asked(*devices), 5.0)
    for device in devices:
        device.push(device.reply(device.pull(), content(device)))
    return outcome(reply for _, reply in gate.pull(names, 5.0))


def test_honest_replies_that_came_are_taken_when_time_is_over(link, passing):
    """Both are there, and the time was over before anybody looked."""
    mallory, ada = link.device("mallory"), link.device("ada")
    assert answering(passing, link.grid(), [ada], {mallory: promises}, seconds=0.0) == {ada.node: 0, mallory.node: 4}


def test_a_reply_in_parts_comes_when_it_is_whole(link):
    ada, gate = link.device("ada"), link.grid()
    (name,) = gate.push(asked(ada), 1.0)
    reply = ada.reply(ada.pull(), content(ada))
    send_the_rest = ada.push(reply, objects=1)
    assert list(gate.pull([name], 1.0)) == []
    send_the_rest()
    ((_, found),) = gate.pull([name], 1.0)
    assert found.content == content(ada)
    assert list(gate.pull([name], 1.0, last=True)) == []


def test_confirming_too_early_is_that_nodes_failure(link):
    """The SuperLink deletes the message's objects while the ServerApp is still sending them."""
    mallory, ada = link.device("mallory"), link.device("ada")
    gate, first = link.grid(), []

    def early(call):
        if call == "PushObject" and not first:
            first.extend(link.state.get_message_ins(node_id=mallory.node, limit=1))
            link.state.object_store.delete(first[0].metadata.message_id)

    link.calls = early
    names = gate.push(asked(mallory, ada), 5.0)
    assert len(first) == 1
    ada.push(ada.reply(ada.pull(), content(ada)))
    assert outcome(reply for _, reply in gate.pull(names, 1.0)) == {mallory.node: 4, ada.node: 0}


def test_a_poisoned_object_id_ends_no_run(tmp_path):
    """Promised with other children, the id of a Query's content can't be sent again: HTTP 500 from the SuperLink."""
    link = SuperLinkHarness(tmp_path)
    mallory, gate = link.device("mallory"), link.grid()
    (name,) = gate.push(asked(mallory), 1.0)
    message = mallory.pull()
    known = next(iter(message.content.values())).object_id
    gate.forget([name])
    link.state.object_store.delete(message.metadata.message_id)
    reply = mallory.reply(message, content(mallory))
    poison = ObjectTree(object_id=known, children=[ObjectTree(object_id="f" * 64)])
    mallory.push(reply, tree=ObjectTree(object_id=reply.object_id, children=[poison]))
    found = gate.send_and_receive(asked(mallory), timeout=LIMIT)
    assert outcome(found) == {mallory.node: 4}
    assert there(gate, mallory) == []


def test_who_comes_late_is_counted_and_never_pulled(link):
    ada, gate = link.device("ada"), link.grid()
    late, calls = StragglerTracker(gate), []
    late.add(gate.push(asked(ada), 1.0), round=1)
    assert late.count(round=2) == 0
    ada.push(ada.reply(ada.pull(), content(ada)), objects=0)
    link.calls = calls.append
    assert late.count(round=2) == 1
    assert "PullObject" not in calls
    assert late.count(round=3) == 0


@pytest.mark.parametrize("seconds", [0.5, 10.0, 3600.0])
def test_a_superlink_that_answers_nothing_does_not_hold_a_round(link, passing, seconds):
    devices, gate = [link.device(name) for name in "abc"], link.grid()

    def stuck(_call):
        passing.sleep(gate._calls._client._client.timeout.read)
        raise httpx.ReadTimeout("nothing came")

    names = gate.push(asked(*devices), 1.0)
    link.calls = stuck
    gate.push = lambda _messages, _seconds: names
    passing.passed = 0.0
    clock = WallClock()
    assert list(collect(gate, [], clock, until=seconds)) == []
    assert seconds <= passing.passed < seconds + 2.0
    gate = link.grid()
    passing.passed = 0.0
    assert outcome(collect(gate, asked(*devices), clock, until=seconds)) == {device.node: 4 for device in devices}
    assert passing.passed < seconds + 2.0
    link.calls = lambda _: None
    assert there(gate, *devices) == ["a", "b", "c"]  # it was none of them


def test_a_superlink_that_is_away_is_nobodys_fault(link):
    ada, gate = link.device("ada"), link.grid()
    (name,) = gate.push(asked(ada), 1.0)
    ada.push(ada.reply(ada.pull(), content(ada)))
    down = 5

    def refused(_call):
        nonlocal down
        down -= 1
        if down > 0:
            raise httpx.ConnectError("refused")

    link.calls = refused
    assert list(gate.pull([name], 1.0)) == []
    assert outcome(gate_pulled(gate, name)) == {ada.node: 0}
    assert there(gate, ada) == ["ada"]


def gate_pulled(gate, name):
    for _ in range(10):
        if found := [reply for _, reply in gate.pull([name], 1.0)]:
            return found
    raise AssertionError("nothing came")


def test_a_question_is_not_waited_for_and_its_answer_comes_later(link, passing):
    ada, slow, gate = link.device("ada"), link.device("slow"), link.grid()
    for message in asked(ada, slow):
        gate._queries._pending[message.metadata.dst_node_id] = gate.push([message], 1.0)[0], passing.monotonic()
    ada.push(ada.reply(ada.pull(), content(ada)))
    assert outcome(gate.query_nodes([], timeout=60.0, wait=0.0)) == {ada.node: 0}
    assert outcome(gate.query_nodes(asked(slow), timeout=60.0, wait=0.0)) == {}  # it is not asked again
    slow.push(slow.reply(slow.pull(), content(slow)))
    assert outcome(gate.query_nodes(asked(slow), timeout=60.0, wait=0.0)) == {slow.node: 0}


def test_who_never_answers_is_left_out(link):
    ada, gate = link.device("ada"), link.grid()
    assert outcome(gate.query_nodes(asked(ada), timeout=0.05, wait=1.0)) == {}
    assert there(gate, ada) == []


def test_pauses_double_and_end():
    time = 0.0
    pauses = NodeBackoff(lambda: time)
    assert [pauses.add(1) for _ in range(8)] == [FIRST * 2**n for n in range(6)] + [LONGEST] * 2
    assert pauses.available([1, 2]) == [2]
    time = LONGEST
    assert pauses.available([1, 2]) == [1, 2]
    pauses.add(1)
    pauses.clear(1)
    assert pauses.available([1]) == [1]
    assert pauses.add(1) == FIRST


def test_names_are_those_of_the_register(link):
    devices, gate = [link.device(name) for name in "ab"], link.grid()
    assert there(gate, *devices) == ["a", "b"]
    assert {device.node: device.name for device in devices}.items() <= gate.names().items()


def test_who_leaves_in_between_gets_no_name_of_its_choice(link, caplog):
    """It goes once it was found there, when it could be called anything, and is back to answer the question."""
    mallory, gate, federated = link.device("mallory"), link.grid(), strategy()
    found, pushed = gate.get_node_ids, gate.push

    def leaves():
        nodes = [node for node in found() if node == mallory.node]
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
    assert "calls itself 'ada', is not asked: its key was registered as 'mallory'" in caplog.text


def test_an_asynchronous_round_is_over_in_time_too(link, passing):
    """One promises and never sends, one is silent, one is honest; each round ends with the honest update."""
    mallory, silent, ada = (link.device(name) for name in ("mallory", "silent", "ada"))
    gate, federated = link.grid(), strategy(aggregation=FedIT())
    gate.names = lambda: {device.node: device.name for device in (mallory, silent, ada)}
    for device in (mallory, silent, ada):
        federated._roster.update_report(device.node, replace(REPORT, device=device.name), now=0.0)
    federated.query = lambda _: {n: r for n, r in federated._roster.reports.items() if n in gate.get_node_ids()}
    limits = RoundLimits(clock=WallClock(), timeout=LIMIT)
    round_runner = FedBuffRunner(gate, federated, limits, shift=REBASES["fedit"], size=3, concurrency=3)
    pushed, arrays = gate.push, records.adapter_to_record(encode(to_tensors(init_adapter(SITES, PLAN.rank, seed=0))))

    def push(messages, left):
        messages = list(messages)
        identifiers = pushed(messages, left)
        for message in messages:
            if message.metadata.dst_node_id == mallory.node:
                promises(mallory)
            elif message.metadata.dst_node_id == ada.node:
                request = ada.pull()
                train = records.request_from_records("train", request.content)
                ada.push(ada.reply(request, records.reply_to_records(_reply(train, FakeDevice("ada")))))
        return identifiers

    gate.push = push
    for number in (1, 2):
        passing.passed = 0.0
        assert round_runner.train(number, arrays) is not None
        assert passing.passed < LIMIT + 2.0
        assert federated.trained.replied >= 1


def test_messages_that_a_node_never_takes_are_deleted(link):
    ada, gate = link.device("ada"), link.grid()
    (name,) = gate.push(asked(ada), 1.0)
    assert name in link.state.object_store
    gate.forget([name])
    assert there(gate, ada) == ["ada"]
    assert name not in link.state.object_store, "before the next round"
    pulled = fleet_handlers.pull_messages(
        PullMessagesRequest(node=Node(node_id=ada.node)), link.state, link.state.object_store
    )
    assert not pulled.messages_list, "a node that takes messages again isn't given it"
    (again,) = gate.push(asked(ada), 1.0)
    ada.push(ada.reply(ada.pull(), content(ada)))
    assert outcome(reply for _, reply in gate.pull([again], 1.0)) == {ada.node: 0}
