"""Timed grid: arrival times of replies, and missing replies."""

from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message

from conf.schemas.fleet import WorkloadConfig
from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import MethodOption, PersonalizationMethod, Query, Train
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


def collect_replies(grid, fleet, messages, until=1e6):
    """Return (time, node, update) of every reply."""
    replies = []
    for reply in collect(grid, messages, fleet.clock, until=until):
        update = records.reply_from_records("train", reply.content) if reply.has_content() else None
        replies.append((fleet.clock.now(), reply.metadata.src_node_id, update))
    return replies


def close_round(fleet):
    """Close the fleet's current round and return its outcomes."""
    fleet.log.close(len(fleet.log.rounds), fleet.clock.now())
    return fleet.log.rounds[-1]


def test_replies_arrive_after_download_work_and_upload(tmp_path):
    grid, fleet = timed_grid(
        tmp_path,
        virtual_device("a"),
        virtual_device("b", speed=4.0, uplink_mbps=0.5),
        virtual_device("c", downlink_mbps=0.1),
    )
    replies = collect_replies(grid, fleet, [train(node) for node in (1, 2, 3)])
    assert [node for _, node, _ in replies] == [2, 1, 3]
    times = {node: time for time, node, _ in replies}
    up = len(replies[0][2].adapter) * 8 / 1e6
    assert times[1] == pytest.approx(LINK + WORK + up)
    assert times[2] == pytest.approx(LINK + WORK / 4 + 2 * up)
    assert times[3] == pytest.approx(10 * LINK + WORK + up)
    for time, _, update in replies:
        assert update.seconds == pytest.approx(time)
    assert replies[1][2].joules == pytest.approx(times[1] * 1.0 + WORK * 4.0)  # idle power, and work on top
    assert close_round(fleet).joules == pytest.approx(sum(update.joules for *_, update in replies))


def test_running_jobs_share_a_batch_and_doomed_ones_are_skipped(tmp_path):
    calls = []

    def recording_perform(jobs):
        calls.append([name for name, _ in jobs])
        return perform(jobs)

    devices = [
        virtual_device("a"),
        virtual_device("b", speed=0.5),
        virtual_device("c", memory_mib=RUNTIME + 2.9),
        virtual_device("d"),
    ]
    grid, fleet = timed_grid(tmp_path, *devices, perform=recording_perform)
    replies = collect_replies(grid, fleet, [train(node) for node in (1, 2, 3, 4)], until=1000.0)
    assert [node for _, node, _ in replies] == [1, 4, 2]
    assert calls == [["a", "b", "d"]]
    assert close_round(fleet).lost == {KILLED: 1}


def test_failed_devices_never_reply(tmp_path):
    devices = [
        virtual_device("a", battery_wh=10.0, charge=0.005),  # 18 J
        virtual_device("b", interruptible=True, availability=DailySchedule([0.0, 24.0], [0.0, 5 / 3600])),
        virtual_device("c", dropout_per_hour=0.9999999, speed=1e-3),
        virtual_device("d", availability=DailySchedule([], [0.0, 24.0])),
        virtual_device("e"),
    ]
    grid, fleet = timed_grid(tmp_path, *devices)
    assert list(grid.get_node_ids()) == [1, 2, 3, 5]  # an unplugged device without a battery is off
    replies = collect_replies(grid, fleet, [train(node) for node in (1, 2, 3, 4, 5)], until=20_000.0)
    assert [node for _, node, _ in replies] == [5]
    assert close_round(fleet).lost == {"flat": 1, "left": 1, DROPPED: 1, "off": 1}
    assert 1 not in grid.get_node_ids()


def test_dropouts_follow_the_seed(tmp_path):
    def lost(seed):
        devices = [virtual_device(name, dropout_per_hour=0.5, speed=WORK / 3600) for name in "abcdefghij"]
        grid, fleet = timed_grid(tmp_path, *devices, seed=seed)
        replies = collect_replies(grid, fleet, [train(node) for node in range(1, 11)], until=10_000.0)
        assert close_round(fleet).lost == {DROPPED: 10 - len(replies)}
        return [(time, node) for time, node, _ in replies]

    assert lost(1) == lost(1)
    assert lost(1) != lost(2)
    assert sum(len(lost(seed)) for seed in range(10)) == pytest.approx(50, abs=20)  # half of them, in an hour


def test_tasks_of_a_device_are_sequential(tmp_path):
    grid, fleet = timed_grid(tmp_path, virtual_device("a"))
    replies = collect_replies(grid, fleet, [train(1, number) for number in (1, 2)])
    each = LINK + WORK + len(replies[0][2].adapter) * 8 / 1e6
    assert [time for time, *_ in replies] == pytest.approx([each, 2 * each])
    assert [update.seconds for *_, update in replies] == pytest.approx([each, each])


def test_report_states_the_current_state(tmp_path):
    night = DailySchedule([0.0, 1.0], [0.0, 2.0])
    grid, fleet = timed_grid(
        tmp_path,
        virtual_device("a", battery_wh=10.0, charge=5.0, charger_watts=5.0, availability=night, throttle_after=6.0),
        virtual_device("b"),
    )

    def reports():
        queries = [Message(records.request_to_records(Query()), node, "query") for node in (1, 2)]
        return [records.reply_from_records("query", reply.content) for reply in grid.send_and_receive(queries)]

    a, b = reports()
    assert (a.battery, a.battery_wh, a.charging, a.busy, a.hot) == (0.4, 10.0, True, False, False)
    assert (b.battery, b.charging, b.busy, b.hot) == (None, False, False, False)
    grid.push_messages([train(1)])
    fleet.clock.wait(7.0)
    assert (reports()[0].busy, reports()[0].hot) == (True, True)
    for _ in range(18):
        fleet.clock.wait(1e9)
    a, _ = reports()
    assert fleet.clock.now() > 9000
    assert (a.battery, a.charging, a.busy, a.hot) == (0.6, False, True, False)  # in use by its owner


def test_errors_are_answered_at_once(tmp_path):
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


def test_saved_fleet_is_restored(tmp_path):
    schedule = DailySchedule([10.0, 12.0], [0.0, 24.0], jitter=100.0, seed=3)
    devices = [
        virtual_device("a", battery_wh=10.0, charge=6.0, availability=schedule, throttle_after=4.0),
        virtual_device("b"),
    ]
    grid, fleet = timed_grid(tmp_path, *devices)
    collect_replies(grid, fleet, [train(1)])
    fleet.save(0)
    before = {device.name: device.state_at(5000.0) for device in fleet.devices.values()}
    restored = VirtualFleet(tmp_path / "fleet", {"a": replace(devices[0], state=None), "b": virtual_device("b")})
    restored.resume(0)
    assert (restored.clock.now(), restored.log.rounds) == (fleet.log.rounds[0].ended, fleet.log.rounds)
    assert {device.name: device.state_at(5000.0) for device in restored.devices.values()} == before
    with pytest.raises(Exception, match="other devices"):
        VirtualFleet(tmp_path / "fleet", {"z": virtual_device("z")}).resume(0)
    with pytest.raises(Exception, match="can't be resumed from"):
        restored.resume(1)


def test_workload_scales_memory_and_arithmetic():
    plan, device = replace(PLAN, rank=6), virtual_device("a", memory_mib=RUNTIME + 6.0).hardware.known_device
    workload = WorkloadConfig(memory_factor=2.0, compute_factor=3.0)
    larger = Costs(lambda rank: replace(COSTS._predict(rank), moved_bytes=10**9), COSTS._pass_costs, workload)
    for costs, most, seconds in ((COSTS, 6, WORK), (larger, 3, 3 * 2 * WORK)):
        assert costs.fits(replace(plan, rank=most), device)
        assert not costs.fits(replace(plan, rank=most + 1), device)
        assert costs.seconds(plan, device) == pytest.approx(seconds)


def test_steps_of_personalization_take_time():
    method = PersonalizationMethod(name="fedalt", options=(MethodOption(name="steps", value=float(PLAN.steps)),))
    device = virtual_device("a").hardware.known_device
    assert COSTS.seconds(replace(PLAN, personalization=method), device) == 2 * COSTS.seconds(PLAN, device)


def test_directions_are_not_trained_as_rank():
    """Rank 2 is trained; a device also holds what its method declares, at all sites of the adapter."""
    method = PersonalizationMethod(name="directions", options=(MethodOption(name="number", value=7.0),))
    plan = replace(PLAN, round=1, rank=16, personalization=method)
    costs = Costs(COSTS._predict, COSTS._pass_costs, WorkloadConfig(memory_factor=2.0), SITES)
    held = 4 * sum(7 * 2 * (site.inputs + 3 * site.outputs) for site in SITES.values())
    assert costs.required_bytes(plan) == 2 * ((2 << 20) + held)
    assert costs.required_bytes(replace(plan, sites=("x",))) == 2 * ((3 << 20) + held)
    plain = replace(PLAN, rank=2, steps=PLAN.steps + 4)
    device = virtual_device("a").hardware.known_device
    assert costs.seconds(plan, device) == costs.seconds(plain, device)


def test_fewer_sites_need_less_memory_and_time():
    plan, device = replace(PLAN, rank=6), virtual_device("a", memory_mib=RUNTIME + 6.0).hardware.known_device
    larger = Costs(COSTS._predict, COSTS._pass_costs, WorkloadConfig(memory_factor=2.0, compute_factor=3.0))
    for sites, mib, share in ((("x", "y"), 4, 0.8), (("x",), 3, 0.7), (("y",), 2, 0.3)):
        partial_plan = replace(plan, sites=sites)
        assert (COSTS.required_bytes(partial_plan), larger.required_bytes(partial_plan)) == (mib << 20, 2 * mib << 20)
        assert COSTS.seconds(partial_plan, device) == pytest.approx(share * COSTS.seconds(plan, device))
        assert larger.seconds(partial_plan, device) == pytest.approx(share * larger.seconds(plan, device))
        assert COSTS.fits(partial_plan, device)


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
