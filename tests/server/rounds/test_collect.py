"""Replies as they come, over the gated grid on the wall's clock."""

import pytest

from protocol import records
from protocol.messages import Query
from server.grid.validating_grid import ValidatingGrid
from server.rounds.collect import collect
from simulations.grid.cohort import CohortGrid
from strategies.clock import WallClock
from tests.helpers.fleet import FakeDevice, handle, perform, strategy


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


class Slow(CohortGrid):
    """Whose replies come one look after another, and of whom the last never does."""

    looks = 0

    def pull_messages(self, message_ids):
        (name,) = message_ids
        self.looks += 1
        return super().pull_messages([name]) if int(name) < 4 and self.looks > 3 * int(name) else []


def asked(grid):
    return [strategy()._message(Query(), node) for node in grid.get_node_ids()]


def names(replies):
    return [records.reply_from_records("query", reply.content).device for reply in replies]


@pytest.mark.parametrize(("enough", "expected", "left"), [(None, "abc", 1), (2, "ab", 2), (0, "", 4)])
def test_until_there_are_enough_or_it_is_too_late(enough, expected, left):
    grid = ValidatingGrid(Slow([FakeDevice(name) for name in "abcd"], perform), largest=0, poll=0.01)
    clock, found, late = WallClock(poll=0.01), [], set()
    replies = collect(
        grid,
        asked(grid),
        clock,
        until=clock.now() + (0.3 if enough is None else 60.0),
        is_complete=lambda: enough is not None and len(found) >= enough,
        late=late,
    )
    for reply in replies:
        found.append(reply)
    assert names(found) == list(expected)
    assert len(late) == left


def test_what_came_late_can_be_pulled_and_no_other():
    grid = ValidatingGrid(Slow([FakeDevice(name) for name in "abcd"], perform), largest=0, poll=0.01)
    clock, late = WallClock(poll=0.01), set()
    assert list(collect(grid, asked(grid), clock, until=clock.now(), late=late)) == []
    for _ in range(20):
        if found := [reply for name in sorted(late) for reply in grid.pull_messages([name])]:
            break
    assert names(found)[0] == "a"
    assert list(grid.pull_messages(["1", "not asked"])) == []  # a reply is pulled once
