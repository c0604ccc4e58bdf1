"""Collecting replies over the validating grid, with the wall clock."""

import pytest

from protocol import records
from protocol.messages import Query
from server.grid.validating_grid import ValidatingGrid
from server.rounds.collect import collect
from simulations.grid.cohort import CohortGrid
from strategies.clock import WallClock
from strategies.round.messages import to_messages
from tests.helpers.fleet import FakeDevice, handle, perform


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


class _SlowGrid(CohortGrid):
    """Replies arrive one by one, poll after poll; the last one never does."""

    polls = 0

    def pull_messages(self, message_ids):
        (name,) = message_ids
        self.polls += 1
        return super().pull_messages([name]) if int(name) < 4 and self.polls > 3 * int(name) else []


def queries(grid):
    return to_messages(dict.fromkeys(grid.get_node_ids(), Query()))


def names(replies):
    return [records.reply_from_records("query", reply.content).device for reply in replies]


@pytest.mark.parametrize(("enough", "expected", "missing"), [(None, "abc", 1), (2, "ab", 2), (0, "", 4)])
def test_ends_when_complete_or_late(enough, expected, missing):
    grid = ValidatingGrid(_SlowGrid([FakeDevice(name) for name in "abcd"], perform), largest=0, poll=0.01)
    clock, collected, late = WallClock(poll=0.01), [], set()
    replies = collect(
        grid,
        queries(grid),
        clock,
        until=clock.now() + (0.3 if enough is None else 60.0),
        is_complete=lambda: enough is not None and len(collected) >= enough,
        late=late,
    )
    for reply in replies:
        collected.append(reply)
    assert names(collected) == list(expected)
    assert len(late) == missing


def test_late_replies_can_be_pulled_once():
    grid = ValidatingGrid(_SlowGrid([FakeDevice(name) for name in "abcd"], perform), largest=0, poll=0.01)
    clock, late = WallClock(poll=0.01), set()
    assert list(collect(grid, queries(grid), clock, until=clock.now(), late=late)) == []
    for _ in range(20):
        if collected := [reply for name in sorted(late) for reply in grid.pull_messages([name])]:
            break
    assert names(collected)[0] == "a"
    assert list(grid.pull_messages(["1", "not asked"])) == []  # a reply is pulled once
