"""The grid of a fleet that lives: when replies come, and whose never do."""

from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message

from conf.schemas.fleet import WorkloadConfig
from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import Query, Train
from protocol.tensor_codec import encode
from server.rounds.collect import collect
from simulations.fleet.availability import DailySchedule
from simulations.fleet.costs import Costs
from simulations.fleet.outcomes import DROPPED, KILLED, gini
from simulations.fleet.virtual_fleet import VirtualFleet
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, perform
from tests.helpers.timed_fleet import COSTS, RUNTIME, timed_grid, virtual_device

SENT = encode(to_tensors(init_adapter(SITES, 3, seed=0)))
WORK = PLAN.steps * PLAN.batch_size  # seconds at speed 1
LINK = len(SENT) * 8 / 1e6  # seconds at 1 megabit a second


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def train(node, number=1):
    request = Train(plan=replace(PLAN, round=number), adapter=SENT)
    return Message(records.request_to_records(request), node, "train")


def come(grid, lives, messages, until=1e6):
    """(time, node, reply) of every reply."""
    found = []
    for reply in collect(grid, messages, lives.clock, until=until):
        update = records.reply_from_records("train", reply.content) if reply.has_content() else None
        found.append((lives.clock.now(), reply.metadata.src_node_id, update))
    return found


def ends(lives):
    """What the fleet's log says of everything so far."""
    lives.log.close(len(lives.log.rounds), lives.clock.now())
    return lives.log.rounds[-1]


def test_replies_come_when_downloads_work_and_uploads_are_over(tmp_path):
    grid, lives = timed_grid(
        tmp_path,
        virtual_device("a"),
        virtual_device("b", speed=4.0, uplink_mbps=0.5),
        virtual_device("c", downlink_mbps=0.1),
    )
    found = come(grid, lives, [train(node) for node in (1, 2, 3)])
    assert [node for _, node, _ in found] == [2, 1, 3]
    times = {node: time for time, node, _ in found}
    up = len(found[0][2].adapter) * 8 / 1e6
    assert times[1] == pytest.approx(LINK + WORK + up)
    assert times[2] == pytest.approx(LINK + WORK / 4 + 2 * up)
    assert times[3] == pytest.approx(10 * LINK + WORK + up)
    for time, _, update in found:
        assert update.seconds == pytest.approx(time)
    assert found[1][2].joules == pytest.approx(times[1] * 1.0 + WORK * 4.0)  # idling, and work on top
    assert ends(lives).joules == pytest.approx(sum(update.joules for *_, update in found))


def test_what_is_under_way_is_trained_together_and_the_doomed_not_at_all(tmp_path):
    seen = []

    def watched(jobs):
        seen.append([name for name, _ in jobs])
        return perform(jobs)

    fleet = [
        virtual_device("a"),
        virtual_device("b", speed=0.5),
        virtual_device("c", memory_mib=RUNTIME + 2.9),
        virtual_device("d"),
    ]
    grid, lives = timed_grid(tmp_path, *fleet, perform=watched)
    found = come(grid, lives, [train(node) for node in (1, 2, 3, 4)], until=1000.0)
    assert [node for _, node, _ in found] == [1, 4, 2]
    assert seen == [["a", "b", "d"]]
    assert ends(lives).lost == {KILLED: 1}


def test_who_runs_flat_is_used_or_vanishes_never_replies(tmp_path):
    fleet = [
        virtual_device("a", battery_wh=10.0, charge=0.005),  # 18 J
        virtual_device("b", leaves=True, availability=DailySchedule([0.0, 24.0], [0.0, 5 / 3600])),
        virtual_device("c", drop_out=0.9999999, speed=1e-3),
        virtual_device("d", availability=DailySchedule([], [0.0, 24.0])),
        virtual_device("e"),
    ]
    grid, lives = timed_grid(tmp_path, *fleet)
    assert list(grid.get_node_ids()) == [1, 2, 3, 5]  # what isn't plugged in, without a battery, is off
    found = come(grid, lives, [train(node) for node in (1, 2, 3, 4, 5)], until=20_000.0)
    assert [node for _, node, _ in found] == [5]
    assert ends(lives).lost == {"flat": 1, "left": 1, DROPPED: 1, "off": 1}
    assert 1 not in grid.get_node_ids()


def test_the_same_seed_loses_the_same_devices(tmp_path):
    def lost(seed):
        fleet = [virtual_device(name, drop_out=0.5, speed=WORK / 3600) for name in "abcdefghij"]
        grid, lives = timed_grid(tmp_path, *fleet, seed=seed)
        found = come(grid, lives, [train(node) for node in range(1, 11)], until=10_000.0)
        assert ends(lives).lost == {DROPPED: 10 - len(found)}
        return [(time, node) for time, node, _ in found]

    assert lost(1) == lost(1)
    assert lost(1) != lost(2)
    assert sum(len(lost(seed)) for seed in range(10)) == pytest.approx(50, abs=20)  # half of them, in an hour


def test_a_device_does_one_thing_after_another(tmp_path):
    grid, lives = timed_grid(tmp_path, virtual_device("a"))
    found = come(grid, lives, [train(1, number) for number in (1, 2)])
    each = LINK + WORK + len(found[0][2].adapter) * 8 / 1e6
    assert [time for time, *_ in found] == pytest.approx([each, 2 * each])
    assert [update.seconds for *_, update in found] == pytest.approx([each, each])


def test_a_report_says_how_the_device_is_now(tmp_path):
    night = DailySchedule([0.0, 1.0], [0.0, 2.0])
    grid, lives = timed_grid(
        tmp_path,
        virtual_device("a", battery_wh=10.0, charge=5.0, charger_watts=5.0, availability=night, hot_after=6.0),
        virtual_device("b"),
    )

    def reports():
        asked = [Message(records.request_to_records(Query()), node, "query") for node in (1, 2)]
        return [records.reply_from_records("query", reply.content) for reply in grid.send_and_receive(asked)]

    a, b = reports()
    assert (a.battery, a.battery_wh, a.charging, a.busy, a.hot) == (0.4, 10.0, True, False, False)
    assert (b.battery, b.charging, b.busy, b.hot) == (None, False, False, False)
    grid.push_messages([train(1)])
    lives.clock.wait(7.0)
    assert (reports()[0].busy, reports()[0].hot) == (True, True)
    for _ in range(18):
        lives.clock.wait(1e9)
    a, _ = reports()
    assert lives.clock.now() > 9000
    assert (a.battery, a.charging, a.busy, a.hot) == (0.6, False, True, False)  # its owner has it


def test_a_refusal_and_an_unreadable_request_are_answered_at_once(tmp_path):
    def refuse(_reply):
        raise RuntimeError

    grid, _ = timed_grid(
        tmp_path, virtual_device("a"), virtual_device("b"), devices=[FakeDevice("a", misbehave=refuse), FakeDevice("b")]
    )
    broken = train(2)
    broken.content["message"] = ConfigRecord({"json": "{"})
    replies = list(grid.send_and_receive([train(1), broken]))
    assert all(reply.has_error() for reply in replies)
    assert [reply.metadata.src_node_id for reply in replies] == [2, 1]


def test_a_life_goes_on_where_it_was_kept(tmp_path):
    hours = DailySchedule([10.0, 12.0], [0.0, 24.0], jitter=100.0, seed=3)
    fleet = [virtual_device("a", battery_wh=10.0, charge=6.0, availability=hours, hot_after=4.0), virtual_device("b")]
    grid, lives = timed_grid(tmp_path, *fleet)
    come(grid, lives, [train(1)])
    lives.save(0)
    before = {each.name: each.state_at(5000.0) for each in lives.devices.values()}
    again = VirtualFleet(tmp_path / "fleet", {"a": replace(fleet[0], state=None), "b": virtual_device("b")})
    again.resume(0)
    assert (again.clock.now(), again.log.rounds) == (lives.log.rounds[0].ended, lives.log.rounds)
    assert {each.name: each.state_at(5000.0) for each in again.devices.values()} == before
    with pytest.raises(Exception, match="other devices"):
        VirtualFleet(tmp_path / "fleet", {"z": virtual_device("z")}).resume(0)
    with pytest.raises(Exception, match="can't be resumed from"):
        again.resume(1)


def test_a_workload_makes_a_base_larger_but_for_the_process():
    plan, device = replace(PLAN, rank=6), virtual_device("a", memory_mib=RUNTIME + 6.0).hardware.known_device
    times = WorkloadConfig(memory_factor=2.0, compute_factor=3.0)
    larger = Costs(lambda rank: replace(COSTS._predict(rank), moved_bytes=10**9), COSTS._pass_costs, times)
    for costs, most, seconds in ((COSTS, 6, WORK), (larger, 3, 3 * 2 * WORK)):
        assert costs.fits(replace(plan, rank=most), device)
        assert not costs.fits(replace(plan, rank=most + 1), device)
        assert costs.seconds(plan, device) == pytest.approx(seconds)


def test_some_sites_take_less_memory_and_time():
    plan, device = replace(PLAN, rank=6), virtual_device("a", memory_mib=RUNTIME + 6.0).hardware.known_device
    larger = Costs(COSTS._predict, COSTS._pass_costs, WorkloadConfig(memory_factor=2.0, compute_factor=3.0))
    for sites, mib, share in ((("x", "y"), 4, 0.8), (("x",), 3, 0.7), (("y",), 2, 0.3)):
        some = replace(plan, sites=sites)
        assert (COSTS.required_bytes(some), larger.required_bytes(some)) == (mib << 20, 2 * mib << 20)
        assert COSTS.seconds(some, device) == pytest.approx(share * COSTS.seconds(plan, device))
        assert larger.seconds(some, device) == pytest.approx(share * larger.seconds(plan, device))
        assert COSTS.fits(some, device)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 1, 1, 1], 0.0),
        ([0, 0, 0, 8], 0.75),
        ([], 0.0),
        ([0, 0], 0.0),
        ([1, 3], 0.25),
    ],
)
def test_gini(counts, expected):
    assert gini(counts) == pytest.approx(expected)
    pairs = sum(abs(a - b) for a in counts for b in counts)
    assert gini(counts) == pytest.approx(pairs / (2 * len(counts) * sum(counts)) if sum(counts) else 0.0)
