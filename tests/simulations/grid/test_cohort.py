"""In-process grid: order, isolation of failures, commits, and replies that don't depend on batching."""

import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message

from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import Query, Train
from protocol.tensor_codec import encode
from simulations.grid.cohort import CohortGrid
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, perform


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def fleet():
    return [FakeDevice("c"), FakeDevice("a"), FakeDevice("b")]


def train_messages(grid):
    request = Train(plan=replace(PLAN, round=1), adapter=encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    return [Message(records.request_to_records(request), node, "train") for node in grid.get_node_ids()]


def replies_of(grid, messages):
    return {
        reply.metadata.src_node_id: records.reply_from_records(reply.metadata.message_type, reply.content)
        for reply in grid.send_and_receive(messages)
    }


def test_node_ids_follow_the_names():
    grid = CohortGrid(fleet(), perform)
    reports = replies_of(
        grid, [Message(records.request_to_records(Query()), node, "query") for node in grid.get_node_ids()]
    )
    assert {node: report.device for node, report in reports.items()} == {1: "a", 2: "b", 3: "c"}


def test_first_node_is_given():
    """Two grids of one run have different nodes."""
    assert list(CohortGrid(fleet(), perform, first_node=4).get_node_ids()) == [4, 5, 6]


def test_jobs_are_batched_only_if_asked():
    calls = []

    def recording_perform(jobs):
        calls.append([name for name, _ in jobs])
        return perform(jobs)

    results = []
    for batched in (True, False):
        grid = CohortGrid(fleet(), recording_perform, batched=batched)
        results.append(replies_of(grid, train_messages(grid)))
    assert calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    assert results[0] == results[1]


def test_one_failure_harms_no_other_device():
    def break_(_reply):
        raise RuntimeError("/home/ann/photos/secret.jpg is damaged")

    def fail_the_job(jobs):
        return [ValueError("no memory") if name == "c" else 0.0 for name, _ in jobs]

    devices = [FakeDevice("a", misbehave=break_), FakeDevice("b"), FakeDevice("c")]
    grid = CohortGrid(devices, fail_the_job)
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(train_messages(grid))}
    assert sorted(replies) == [1, 2, 3]
    assert replies[2].has_content()
    assert replies[1].error.code == 2
    assert replies[1].error.reason.startswith("failed")
    assert "secret" not in replies[1].error.reason
    assert replies[3].has_error()


def test_replies_are_pulled_once():
    grid = CohortGrid(fleet(), perform)
    identifiers = list(grid.push_messages(train_messages(grid)))
    assert len(list(grid.pull_messages(identifiers))) == 3
    assert list(grid.pull_messages(identifiers)) == []


def test_unreadable_request_is_one_nodes_error():
    grid = CohortGrid(fleet(), perform)
    messages = train_messages(grid)
    messages[1].content["message"] = ConfigRecord({"json": "{"})
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    assert [replies[node].has_error() for node in (1, 2, 3)] == [False, True, False]
    assert replies[2].error.reason.startswith(
        "refused: malformed message: must contain exactly json"
    )  # the server may know the reason


def test_batches_are_bounded_and_lazy(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.MAX_BATCH", 3)
    alive, counts, batches = weakref.WeakSet(), [], []

    class Token:
        """Lives as long as its conversation."""

    def talk(request, device):
        token = Token()
        alive.add(token)
        yield (device.name, "Train")
        return (yield from handle(request, device))

    def recording_perform(jobs):
        batches.append([name for name, _ in jobs])
        counts.append(len(alive))
        return perform(jobs)

    monkeypatch.setattr("simulations.grid.cohort.handle", talk)
    grid = CohortGrid([FakeDevice(name) for name in "abcdefgh"], recording_perform)
    replies = iter(grid.send_and_receive(train_messages(grid)))
    assert batches == []
    assert next(replies).metadata.src_node_id == 1
    assert batches == [["a", "b", "c"]] * 2
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4, 5, 6, 7, 8]
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 2, 2]
    assert max(counts) == 3
    assert not alive


@pytest.mark.parametrize("batched", [True, False])
def test_charges_are_committed_before_jobs_and_seals_before_replies(batched):
    events = []

    @contextmanager
    def storage():
        yield lambda: events.append("commit")
        events.append("commit")

    def recording_perform(jobs):
        events.append(f"perform {len(jobs)}")
        return perform(jobs)

    grid = CohortGrid(fleet(), recording_perform, batched=batched, group_commit=storage)
    for _ in grid.send_and_receive(train_messages(grid)):
        events.append("reply")
    one = ["commit", "perform 1", "commit", "reply"]
    assert events == (["commit", "perform 3", "commit", "reply", "reply", "reply"] if batched else one * 3)


def test_failed_commit_prevents_jobs():
    @contextmanager
    def storage():
        def fail():
            raise OSError("disk full")

        yield fail

    def never(_jobs):
        raise AssertionError("performed without a commit")

    grid = CohortGrid(fleet(), never, group_commit=storage)
    with pytest.raises(OSError, match="disk full"):
        list(grid.send_and_receive(train_messages(grid)))
