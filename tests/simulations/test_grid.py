"""The in-process grid: order, isolation of failures, and the same replies however jobs are grouped."""

from dataclasses import replace

import pytest
from flwr.app import Message

from models.adapter import initial, to_tensors
from protocol import records
from protocol.codec import encode
from protocol.messages import Query, Train
from simulations.grid import InProcessGrid
from tests.fleet import PLAN, SITES, FakeDevice, handle, perform


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.handle", handle)


def fleet():
    return [FakeDevice("c"), FakeDevice("a"), FakeDevice("b")]


def train_messages(grid):
    request = Train(plan=replace(PLAN, round=1), adapter=encode(to_tensors(initial(SITES, 3, seed=0))))
    return [Message(records.request_to_records(request), node, "train") for node in grid.get_node_ids()]


def replies_of(grid, messages):
    return {
        reply.metadata.src_node_id: records.reply_from_records(reply.metadata.message_type, reply.content)
        for reply in grid.send_and_receive(messages)
    }


def test_node_ids_follow_the_names():
    grid = InProcessGrid(fleet(), perform, cohort=True)
    found = replies_of(
        grid, [Message(records.request_to_records(Query()), node, "query") for node in grid.get_node_ids()]
    )
    assert {node: report.device for node, report in found.items()} == {1: "a", 2: "b", 3: "c"}


def test_cohort_gathers_jobs_and_serial_does_not():
    seen = []

    def watched(jobs):
        seen.append([name for name, _ in jobs])
        return perform(jobs)

    results = []
    for cohort in (True, False):
        grid = InProcessGrid(fleet(), watched, cohort=cohort)
        results.append(replies_of(grid, train_messages(grid)))
    assert seen == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    assert results[0] == results[1]


def test_the_failure_of_one_is_its_own():
    def break_(_reply):
        raise RuntimeError("/home/ann/photos/secret.jpg is damaged")

    def fail_the_job(jobs):
        return [ValueError("no memory") if name == "c" else 0.0 for name, _ in jobs]

    devices = [FakeDevice("a", misbehave=break_), FakeDevice("b"), FakeDevice("c")]
    grid = InProcessGrid(devices, fail_the_job, cohort=True)
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(train_messages(grid))}
    assert sorted(replies) == [1, 2, 3]
    assert replies[2].has_content()
    assert replies[1].error.code == 2
    assert "RuntimeError" in replies[1].error.reason
    assert "secret" not in replies[1].error.reason
    assert replies[3].has_error()


def test_replies_are_pulled_once():
    grid = InProcessGrid(fleet(), perform, cohort=True)
    identifiers = list(grid.push_messages(train_messages(grid)))
    assert len(list(grid.pull_messages(identifiers))) == 3
    assert list(grid.pull_messages(identifiers)) == []
