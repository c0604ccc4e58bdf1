"""Replies that Flower can't unpack, tested with Flower's unpacking."""

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
from protocol.tensor_codec import encode, max_payload
from server.grid.validating_grid import ValidatingGrid
from server.supervisor.memory_limit import memory_limit
from simulations.grid.cohort import CohortGrid
from tests.helpers.fleet import SITES, FakeDevice, handle, perform, strategy

Change = Callable[[dict[str, bytes], Message], None]


class _UnpackingGrid(CohortGrid):
    """Unpacks stored objects of replies as a ServerApp's grid does, and raises the same errors."""

    changes: dict[int, Change]  # changes to the pushed objects, by node
    late: int = 0  # number of polls before replies arrive

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.late:
            self.late -= 1
            return []
        return [self._unpacked(reply) for reply in super().pull_messages(message_ids)]

    def _unpacked(self, reply: Message) -> Message:
        objects = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
        self.changes.get(reply.metadata.src_node_id, lambda _objects, _reply: None)(objects, reply)
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


def missing_chunk(objects: dict[str, bytes], _reply: Message) -> None:
    del objects[of_type(objects, "ArrayChunk")]


def other_type(objects: dict[str, bytes], _reply: Message) -> None:
    name = of_type(objects, "RecordDict")
    objects[name] = objects[of_type(objects, "ConfigRecord")]


def as_other_node(objects: dict[str, bytes], reply: Message) -> None:
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
    "a shape of strings": with_fields("Array", shape=["x"]),
    "deep nesting": with_body("RecordDict", b"[" * 100_000),
    "an object missing": missing_chunk,
    "another type": other_type,
}


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def train(changes: dict[int, Change], late: int = 0) -> dict[str, int]:
    """Train with three devices, and return the strategy's dropped replies by reason."""
    grid = _UnpackingGrid([FakeDevice(name) for name in "abc"], perform)
    grid.changes, federated = {}, strategy()
    gate = ValidatingGrid(grid, largest=max_payload(adapter_shapes(SITES, 3)), poll=0.0)
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    messages = federated.configure_train(1, start, ConfigRecord(), gate)
    grid.changes, grid.late = changes, late
    federated.aggregate_train(1, gate.send_and_receive(messages))
    assert federated.trained is not None
    assert federated.trained.replied + sum(federated.trained.dropped.values()) == 3
    return federated.trained.dropped


def test_honest_replies() -> None:
    assert train({}) == {}
    assert train({}, late=7) == {}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unreadable_reply_is_malformed(change: Change) -> None:
    assert train({1: change}) == {"malformed": 1}
    assert train({1: change, 3: change}, late=2) == {"malformed": 2}


def test_forged_sender_is_malformed() -> None:
    """Flower's grid trusts the sender that a message names: node 2 would lose its own reply."""
    assert train({1: as_other_node}) == {"malformed": 1}


def test_flower_grid_raises_on_one_reply() -> None:
    grid = _UnpackingGrid([FakeDevice("a"), FakeDevice("b")], perform)
    grid.changes = {1: CHANGES["no JSON"]}
    federated = strategy()
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    identifiers = grid.push_messages(federated.configure_train(1, start, ConfigRecord(), grid))
    with pytest.raises(json.JSONDecodeError):
        grid.pull_messages(identifiers)


def test_unreceivable_reply_is_a_node_failure(caplog: pytest.LogCaptureFixture) -> None:
    class _BrokenGrid(CohortGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if "1" in message_ids:
                raise ConnectionError("HTTP 500")
            return super().pull_messages(message_ids)

    gate = ValidatingGrid(_BrokenGrid([FakeDevice("a"), FakeDevice("b")], perform), largest=0, poll=0.0)
    assert [report.device for report in strategy().query(gate).values()] == ["b"]
    assert "node 1 is unreachable: its reply can't be pulled: ConnectionError: HTTP 500" in caplog.text
    assert list(gate.get_node_ids()) == [2]  # node 1 is excluded for a while


def test_timeout_forgets_missing_replies() -> None:
    class _SilentGrid(CohortGrid):
        polls = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.polls += len(list(message_ids))
            return []

    grid = _SilentGrid([FakeDevice("a")], perform)
    message = Message(records.request_to_records(Query()), 1, records.QUERY)
    gate = ValidatingGrid(grid, largest=0, poll=0.01)
    assert list(gate.send_and_receive([message], timeout=0.05)) == []
    assert grid.polls >= 1
    assert (gate._pending, grid._replies) == ({}, {})  # both grids have forgotten it


SCRIPT = """
import sys
from server.supervisor.memory_limit import memory_limit
block = bytes(2**24)
try:
    with memory_limit(2**26):
        assert len(bytearray(2**25)) == 2**25
        memory = bytearray()
        while len(memory) < 2**28:
            memory += block
except MemoryError:
    memory = None
    assert len(bytearray(2**28)) == 2**28
    sys.exit(7)
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_memory_limit_applies_only_inside() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, env={"PYTHONPATH": str(root)}, check=False)
    assert done.returncode == 7


def test_nested_limit_never_widens() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(2**30):
        outer = resource.getrlimit(resource.RLIMIT_DATA)
        with memory_limit(2**40):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= outer[0]
        assert resource.getrlimit(resource.RLIMIT_DATA) == outer
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
