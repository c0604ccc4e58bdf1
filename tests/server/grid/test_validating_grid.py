"""Replies that Flower can't unpack, against Flower's own unpacking."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from models.lora.adapter import adapter_shapes, init_adapter, to_tensors
from protocol import records
from protocol.messages import Query
from protocol.tensor_codec import encode, largest
from server.grid.validating_grid import ValidatingGrid
from server.supervisor.memory_limit import memory_limit
from simulations.grid.cohort import CohortGrid
from tests.helpers.fleet import SITES, FakeDevice, handle, perform, strategy

Change = Callable[[dict[str, bytes], Message], None]


class Unpacking(CohortGrid):
    """As a ServerApp's grid: it unpacks what a SuperLink kept of the replies, and raises what Flower does."""

    changed: dict[int, Change]  # by node: what it did to the objects that it pushed
    late: int = 0  # looks in which nothing has come yet

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.late:
            self.late -= 1
            return []
        return [self._unpacked(reply) for reply in super().pull_messages(message_ids)]

    def _unpacked(self, reply: Message) -> Message:
        objects = {name: found.deflate() for name, found in get_all_nested_objects(reply).items()}
        self.changed.get(reply.metadata.src_node_id, lambda _objects, _reply: None)(objects, reply)
        return inflate_object_from_contents(reply.object_id, objects)


def of_type(objects: dict[str, bytes], kind: str) -> str:
    return next(name for name, content in objects.items() if content.startswith(f"{kind} ".encode()))


def with_body(kind: str, body: bytes) -> Change:
    def change(objects: dict[str, bytes], _reply: Message) -> None:
        name = of_type(objects, kind)
        objects[name] = objects[name].split(b"\0")[0] + b"\0" + body

    return change


def with_fields(kind: str, **fields: object) -> Change:
    def change(objects: dict[str, bytes], reply: Message) -> None:
        body = json.loads(objects[of_type(objects, kind)].split(b"\0", 1)[1])
        with_body(kind, json.dumps(body | fields).encode())(objects, reply)

    return change


def missing(objects: dict[str, bytes], _reply: Message) -> None:
    del objects[of_type(objects, "ArrayChunk")]


def other_type(objects: dict[str, bytes], _reply: Message) -> None:
    name = of_type(objects, "RecordDict")
    objects[name] = objects[of_type(objects, "ConfigRecord")]


def as_somebody_else(objects: dict[str, bytes], reply: Message) -> None:
    name = reply.object_id
    reply.metadata.__dict__["_src_node_id"] = 2
    objects[name] = reply.deflate()
    reply.__dict__["_object_id"] = name


CHANGES: dict[str, Change] = {
    "no JSON": with_body("Array", b"{"),
    "no protobuf": with_body("ConfigRecord", b"\xff\xff\xff"),
    "no text": with_body("ArrayRecord", b"\xff"),
    "a chunk that isn't there": with_fields("Array", arraychunk_ids=[7]),
    "a chunk by another name": with_fields("Array", arraychunk_ids=["x"]),
    "a million chunks": with_fields("Array", arraychunk_ids=[0] * 1_000_000),
    "a shape of words": with_fields("Array", shape=["x"]),
    "deep nesting": with_body("RecordDict", b"[" * 100_000),
    "an object missing": missing,
    "another type": other_type,
}


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def train(changed: dict[int, Change], late: int = 0) -> dict[str, int]:
    """What the strategy dropped of three devices' replies."""
    grid = Unpacking([FakeDevice(name) for name in "abc"], perform)
    grid.changed, federated = {}, strategy()
    gate = ValidatingGrid(grid, largest=largest(adapter_shapes(SITES, 3)), poll=0.0)
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    asked = federated.configure_train(1, start, ConfigRecord(), gate)
    grid.changed, grid.late = changed, late
    federated.aggregate_train(1, gate.send_and_receive(asked))
    assert federated.trained is not None
    assert federated.trained.replied + sum(federated.trained.dropped.values()) == 3
    return federated.trained.dropped


def test_honest_replies_come_through() -> None:
    assert train({}) == {}
    assert train({}, late=7) == {}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_flower_can_not_unpack_is_one_devices_malformed_reply(change: Change) -> None:
    assert train({1: change}) == {"malformed": 1}
    assert train({1: change, 3: change}, late=2) == {"malformed": 2}


def test_who_speaks_for_another_harms_only_itself() -> None:
    """Flower's grid takes the sender that a message names for its sender: node 2 would lose its own reply."""
    assert train({1: as_somebody_else}) == {"malformed": 1}


def test_without_the_gate_one_reply_ends_the_round() -> None:
    grid = Unpacking([FakeDevice("a"), FakeDevice("b")], perform)
    grid.changed = {1: CHANGES["no JSON"]}
    federated = strategy()
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    identifiers = grid.push_messages(federated.configure_train(1, start, ConfigRecord(), grid))
    with pytest.raises(json.JSONDecodeError):
        grid.pull_messages(identifiers)


def test_a_reply_that_can_never_be_had_is_that_nodes_failure(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CohortGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if "1" in message_ids:
                raise ConnectionError("HTTP 500")
            return super().pull_messages(message_ids)

    gate = ValidatingGrid(Broken([FakeDevice("a"), FakeDevice("b")], perform), largest=0, poll=0.0)
    assert [report.device for report in strategy().query(gate).values()] == ["b"]
    assert "node 1 is unreachable: its reply can't be pulled: ConnectionError: HTTP 500" in caplog.text
    assert list(gate.get_node_ids()) == [2]  # the other is left out for a while


def test_what_never_comes_is_not_waited_for_after_the_timeout() -> None:
    class Silent(CohortGrid):
        looks = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.looks += len(list(message_ids))
            return []

    grid = Silent([FakeDevice("a")], perform)
    message = Message(records.request_to_records(Query()), 1, records.QUERY)
    gate = ValidatingGrid(grid, largest=0, poll=0.01)
    assert list(gate.send_and_receive([message], timeout=0.05)) == []
    assert grid.looks >= 1
    assert (gate._pending, grid._replies) == ({}, {})  # and forgotten, here and below


LIMITED = """
import sys
from server.supervisor.memory_limit import memory_limit
held = bytes(2**24)
try:
    with memory_limit(2**26):
        assert len(bytearray(2**25)) == 2**25
        found = bytearray()
        while len(found) < 2**28:
            found += held
except MemoryError:
    found = None
    assert len(bytearray(2**28)) == 2**28
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't count what is allocated")
def test_memory_is_limited_inside_and_nowhere_else() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=root, env={"PYTHONPATH": str(root)}, check=False)
    assert done.returncode == 7


def test_a_limit_inside_a_limit_never_widens_it() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(2**30):
        outer = resource.getrlimit(resource.RLIMIT_DATA)
        with memory_limit(2**40):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= outer[0]
        assert resource.getrlimit(resource.RLIMIT_DATA) == outer
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
