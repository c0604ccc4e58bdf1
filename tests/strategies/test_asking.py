"""Selection of devices by their reports, through the strategy and the round loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord

from common.errors import AntherError
from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import Update
from protocol.tensor_codec import encode
from server.rounds import checkpoint
from server.rounds.loop import run_rounds
from server.rounds.state import RunState
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.ffa import FFA
from strategies.central_dp import BudgetExhausted
from strategies.factory.strategy import build
from strategies.flower_strategy import FlowerStrategy
from strategies.planning.plan import PlanLimits
from strategies.planning.site_selection import SiteSelector
from strategies.round.connected_devices import ConnectedDevices
from strategies.round.request import RoundStart
from strategies.selection import Selection
from strategies.selection.deadline import Deadline
from strategies.selection.eafl import EAFL
from strategies.selection.eligible import Eligibility
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from tests.helpers.central import BUDGET, central_dp, poisson, private
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, fresh_state, handle, perform, strategy
from tests.strategies.planning.test_knapsack import table

SETTINGS = OortSettings(pacer_window=1)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


class ManualClock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, until: float) -> None:
        self.time = until


def device(name: str, **report: Any) -> FakeDevice:
    return FakeDevice(name, report=replace(REPORT, device=name, **report))


def train(federated: FlowerStrategy, devices: Iterable[FakeDevice], round: int = 1) -> list[str]:
    """Run a round, and return the names of the devices that were asked."""
    grid = CohortGrid(list(devices), perform)
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    messages = list(federated.configure_train(round, start, ConfigRecord(), grid))
    federated.aggregate_train(round, grid.send_and_receive(messages))
    reports = federated.query(grid)
    return sorted(reports[message.metadata.dst_node_id].device for message in messages)


def test_only_eligible_devices_are_selected() -> None:
    devices = [device(name, busy=name in "ace") for name in "abcdef"]
    federated = strategy(selection=Sample(size=2, seed=0), eligibility=Eligibility(idle=True))
    asked = [train(federated, devices, number) for number in range(1, 9)]
    assert all(len(names) == 2 for names in asked)
    assert {name for names in asked for name in names} == set("bdf")


def test_no_eligible_device_keeps_the_adapter(tmp_path: Path) -> None:
    grid = CohortGrid([device("a", hot=True), device("b", battery=0.2)], perform)
    federated = strategy(eligibility=Eligibility(cool=True, battery=0.4))
    state = run_rounds(
        grid=grid, strategy=federated, state=fresh_state(), rounds=2, checkpoints=tmp_path, on_round=lambda _: None
    )
    assert [done.train and (done.train.asked, done.train.replied) for done in state.history] == [None, (0, 0), (0, 0)]
    assert torch.equal(state.adapter["x"].a, fresh_state().adapter["x"].a)


@pytest.mark.parametrize("secret", [True, False])
def test_central_dp_does_not_replace_ineligible_devices(tmp_path: Path, secret: bool) -> None:
    """A busy device affects neither the sample nor the divisor."""
    selection: dict[str, Any] = {"selection": Sample(size=3, seed=0)}
    if secret:
        level = {"budget": replace(BUDGET, participations=None), "sampling_rate": 0.5}
        selection = {"selection": poisson(0.5), "level": level}
    all_idle, some_busy = (
        private(tmp_path / name, eligibility=Eligibility(idle=True), **selection) for name in ("all idle", "two busy")
    )
    left_out = 0
    for number in (1, 2, 3):
        sample = train(all_idle, [device(name) for name in "abcdef"], number)
        asked_names = train(some_busy, [device(name, busy=name in "bd") for name in "abcdef"], number)
        assert asked_names == [name for name in sample if name not in "bd"]
        left_out += len(sample) - len(asked_names)
        assert some_busy.trained is not None
        assert some_busy.trained.central is not None
        assert some_busy.trained.central.deviation == all_idle.trained.central.deviation  # type: ignore[union-attr]
    assert left_out


UNABLE = {
    "busy": {"busy": True},
    "no such sites": {"sites": ("z",)},
    "too low a rank": {"rank": 1},
}
FAST = OortSettings(pacer_window=1, exploration=0.3, min_exploration=0.3)
SELECTIONS: dict[str, Callable[[], Selection]] = {
    "round robin": lambda: RoundRobin(size=2),
    "oort": lambda: Oort(size=2, seed=3, settings=FAST),
    "sample": lambda: Sample(size=2, seed=0),
    "energy delay": lambda: EnergyDelay(size=2, candidate_factor=2.0, seed=0),
    "deadline": lambda: Deadline(size=2, deadline=1.0, candidate_factor=2.0, seed=0),
}


@pytest.mark.parametrize("unable", UNABLE)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_central_dp_schedule_ignores_unable_devices(tmp_path: Path, selection: str, unable: str) -> None:
    """Neither now nor in later rounds: it counts as selected and is charged, up to its limit."""
    schedules: list[list[list[str]]] = []
    for name, report in (("able", {}), ("unable", UNABLE[unable])):
        federated = private(tmp_path / name, selection=SELECTIONS[selection](), eligibility=Eligibility(idle=True))
        devices = [device(name, examples_per_second=1.0 + ord(name) % 5) for name in "acde"]
        fleet = [*devices, device("b", **report)]
        schedules.append([])
        with suppress(BudgetExhausted):
            for number in range(1, 9):
                schedules[-1].append(train(federated, fleet, number))
        assert federated.central_dp is not None
        paid = federated.central_dp.ledger.participations()
        assert paid == {name: metrics.asked for name, metrics in federated.history.devices.items()}
        assert max(paid.values()) == BUDGET.participations
    able, unable_schedule = schedules
    assert unable_schedule == [[name for name in names if name != "b"] for names in able]
    assert able != unable_schedule


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"selection": EAFL(size=2, seed=0, utility_weight=0.5, settings=SETTINGS)},
            "selection eafl depends on the state of a device",
        ),
        ({"limits": PlanLimits(battery_share=0.5)}, "the battery charge of a device is private with privacy=device"),
    ],
)
def test_central_dp_refuses_transient_state(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        private(tmp_path, **changes)


@pytest.mark.integration
def test_central_dp_refuses_link_limits(tmp_path: Path) -> None:
    """A lower rank is uploaded faster, and would change the selection."""
    with pytest.raises(ValueError, match="the link of a device is private with privacy=device"):
        private(tmp_path, aggregation=FFA(), limits=PlanLimits(metered_rank=1))
    with pytest.raises(ValueError, match="the link of a device is private with privacy=device"):
        private(tmp_path, aggregation=FFA(), limits=PlanLimits(metered_update="int4"))
    for level, rank_limit in (("device", None), ("none", 4)):
        config = compose(f"aggregation=ffa privacy={level} adapter.shared.rank=3")
        ledger = central_dp(tmp_path).ledger
        assert (
            build(config, PLAN, SITES, accept_simulated=True, ledger=ledger).cohort.planner.limits.metered_rank
            == rank_limit
        )
    config = compose("aggregation=ffa privacy=device adapter.shared.rank=3 compression.metered_upload=int4")
    with pytest.raises(AntherError, match=r"compression\.metered_upload=int4: the link of a device is private"):
        build(config, PLAN, SITES, accept_simulated=True, ledger=ledger)


def test_old_reports_are_requested_again_if_they_are_used() -> None:
    clock, devices = ManualClock(), [device("a"), device("b")]
    federated = strategy(eligibility=Eligibility(idle=True), clock=clock, max_state_age=60.0)
    assert train(federated, devices, 1) == ["a", "b"]
    clock.time, devices[0].report = 59.0, replace(devices[0].report, busy=True)
    assert train(federated, devices, 2) == ["a", "b"]  # the report is not stale yet
    assert [one.requests.count("Query") for one in devices] == [1, 1]
    clock.time = 61.0
    assert train(federated, devices, 3) == ["b"]
    assert [one.requests.count("Query") for one in devices] == [2, 2]
    stateless = strategy(clock=clock, max_state_age=60.0)
    for _ in range(2):
        train(stateless, devices)
        clock.time += 1000.0
    assert [one.requests.count("Query") for one in devices] == [3, 3]


def test_busy_nodes_are_not_queried() -> None:
    clock, devices = ManualClock(), [device("a"), device("b")]
    federated = strategy(eligibility=Eligibility(idle=True), clock=clock, max_state_age=60.0)
    train(federated, devices, 1)
    clock.time = 100.0
    begin = RoundStart(number=2, adapter=init_adapter(SITES, 3, seed=0))
    assert set(federated.training.request(begin, CohortGrid(devices, perform), busy={1}).messages) == {2}
    assert [one.requests.count("Query") for one in devices] == [1, 2]
    train(federated, devices, 3)
    assert [one.requests.count("Query") for one in devices] == [2, 2]


def test_devices_with_stale_reports_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep: set[str] = set()

    def sleepy(request: Any, device: FakeDevice) -> Generator[Any, Any, Any]:
        if device.name in asleep:
            raise RuntimeError("asleep")
        return (yield from handle(request, device))

    monkeypatch.setattr("simulations.grid.cohort.handle", sleepy)
    clock, devices = ManualClock(), [FakeDevice("a"), FakeDevice("b")]
    federated = strategy(eligibility=Eligibility(idle=True), clock=clock, max_state_age=60.0)
    for sleeping, asked in ((set(), ["a", "b"]), ({"a"}, ["b"]), (set(), ["a", "b"])):
        asleep.clear()
        asleep.update(sleeping)
        assert train(federated, devices) == asked
        clock.time += 100.0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_central_dp_schedule_ignores_silent_devices(
    tmp_path: Path, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep: set[str] = set()

    def sleepy(request: Any, device: FakeDevice) -> Generator[Any, Any, Any]:
        if device.name in asleep:
            raise RuntimeError("asleep")
        return (yield from handle(request, device))

    monkeypatch.setattr("simulations.grid.cohort.handle", sleepy)
    schedules: list[list[list[str]]] = []
    for name, sleeping in (("awake", set()), ("asleep", {"b"})):
        clock, fleet = ManualClock(), [device(name, examples_per_second=1.0 + ord(name) % 5) for name in "abcde"]
        settings: dict[str, Any] = {"eligibility": Eligibility(idle=True), "clock": clock, "max_state_age": 60.0}
        federated = private(tmp_path / name, selection=SELECTIONS[selection](), **settings)
        asleep.clear()
        schedules.append([])
        with suppress(BudgetExhausted):
            for number in range(1, 9):
                schedules[-1].append(train(federated, fleet, number))
                asleep |= sleeping
                clock.time += 100.0
        assert sorted(report.device for report in federated.query(CohortGrid(fleet, perform)).values()) == list("abcde")
    awake, asleep_schedule = schedules
    assert asleep_schedule == [awake[0], *([name for name in names if name != "b"] for names in awake[1:])]
    assert awake != asleep_schedule


def test_name_belongs_to_its_first_node(caplog: pytest.LogCaptureFixture) -> None:
    """Even while the node is silent; after it has left, another node may use the name."""
    connected = ConnectedDevices(REPORT.base)
    first, second = (replace(REPORT, device=name) for name in "ab")
    connected.update_report(1, first, now=0.0)
    connected.update_report(2, second, now=0.0)
    connected.mark_stale(before=1.0)
    assert connected.nodes_to_query({1, 2, 3}) == [1, 2, 3]
    connected.update_report(3, first, now=2.0)
    connected.update_report(2, first, now=2.0)
    connected.update_report(1, replace(REPORT, device="c"), now=2.0)
    assert caplog.text.count("which reports the name 'a', is rejected: its name is in use") == 2
    assert "which reports the name 'c', is rejected: it was 'a' before" in caplog.text
    assert (connected.reports, connected.stale) == ({1: first, 2: second}, {1, 2})
    connected.update_report(2, second, now=2.0)
    assert (connected.nodes_to_query({1, 2, 3}), connected.stale) == ([1], {1})
    assert connected.nodes_to_query({2, 3}) == [3]
    connected.update_report(3, first, now=3.0)
    assert connected.reports == {2: second, 3: first}
    assert not connected.stale


class RegisteredTestGrid(CohortGrid):
    """Grid whose nodes have registered names, whatever names their devices report."""

    def __init__(self, devices: list[FakeDevice]) -> None:
        super().__init__(devices, perform)  # type: ignore[arg-type]
        self.registered = {node: device.name for node, device in self._devices.items()}

    def names(self) -> dict[int, str]:
        return self.registered

    def query_nodes(self, messages: Any, *, timeout: float, wait: float) -> Any:
        assert 0 < wait < timeout
        return self.send_and_receive(messages)


def test_name_belongs_to_its_registered_key(caplog: pytest.LogCaptureFixture) -> None:
    """A device that uses the name of another one is rejected, and the other one keeps its history."""
    reported_names = {"ada": "ada", "mallory": "ada", "zoe": "sybil-1"}
    devices = [FakeDevice(name, report=replace(REPORT, device=report)) for name, report in reported_names.items()]
    grid, federated = RegisteredTestGrid(devices), strategy()
    grid._devices = dict(sorted(grid._devices.items(), key=lambda item: -item[0]))  # ada replies last
    assert [report.device for report in federated.query(grid).values()] == ["ada"]
    assert "reports the name 'ada', is rejected: its key was registered as 'mallory'" in caplog.text
    assert "reports the name 'sybil-1', is rejected: its key was registered as 'zoe'" in caplog.text
    assert list(federated.query(grid)) == [1]  # the others are not queried again
    federated.cohort.devices.nodes_to_query({1}, now=0.0)  # they reconnect under their own names
    for device in devices:
        device.report = replace(REPORT, device=device.name)
    assert [report.device for report in federated.query(grid).values()] == ["ada", "mallory", "zoe"]


def test_rejected_node_is_queried_again_later() -> None:
    connected = ConnectedDevices(REPORT.base)
    connected.nodes_to_query({1}, now=0.0)
    connected.update_report(1, replace(REPORT, device="x"), now=0.0, registered="a")
    assert connected.nodes_to_query({1}, now=599.0) == []
    assert connected.nodes_to_query({1}, now=601.0) == [1]


@pytest.mark.parametrize(
    "lie", [{"watts": 1e6}, {"examples_per_second": 1e-5}, {"memory_gib": float("nan")}, {"memory_gib": -1.0}]
)
def test_implausible_report_is_rejected(lie: dict[str, float]) -> None:
    connected = ConnectedDevices(REPORT.base)
    connected.update_report(1, replace(REPORT, device="a", **lie), now=0.0)
    assert connected.reports == {}


def test_false_event_count_affects_its_device_only() -> None:
    """Only the device that reported two billion events gets them echoed."""

    def misbehave(reply: Any) -> Any:
        return replace(reply, events=2_000_000_000) if isinstance(reply, Update) else reply

    mallory = FakeDevice("mallory", misbehave=misbehave)
    grid, federated, echoes = RegisteredTestGrid([FakeDevice("ada"), mallory]), strategy(), {}
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    for number in (1, 2):
        sent = list(federated.configure_train(number, start, ConfigRecord(), grid))
        for message in sent:
            request = records.request_from_records("train", message.content)
            echoes[grid.registered[message.metadata.dst_node_id]] = request.echo
        federated.aggregate_train(number, grid.send_and_receive(sent))
    assert echoes == {"ada": 3, "mallory": 2_000_000_000}


def test_server_records_requests_and_losses() -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError

    federated = strategy(selection=RoundRobin(size=2))
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=fails), FakeDevice("c")]
    assert [train(federated, devices, number) for number in (1, 2, 3)] == [["a", "b"], ["a", "c"], ["b", "c"]]
    known = federated.history.devices
    assert {name: (metrics.asked, metrics.last, metrics.loss) for name, metrics in known.items()} == {
        "a": (2, 2, 0.5),
        "b": (2, 3, None),
        "c": (2, 3, 0.5),
    }
    assert known["b"].steps == 0


def run_with_oort(folder: Path, state: RunState, rounds: int) -> RunState:
    federated = strategy(selection=Oort(size=2, seed=3, settings=SETTINGS))
    grid = CohortGrid([device(name, examples_per_second=1.0 + ord(name) % 5) for name in "abcdefg"], perform)
    return run_rounds(
        grid=grid, strategy=federated, state=state, rounds=rounds, checkpoints=folder, on_round=lambda _: None
    )


def test_resumed_run_selects_the_same_devices(tmp_path: Path) -> None:
    """The checkpoint has the state of Oort: rounds and losses of each device, and the rounds of the pacer."""
    uninterrupted = run_with_oort(tmp_path / "whole", fresh_state(), 6)
    for stop in (2, 4, 6):
        saved = checkpoint.load(tmp_path / "parts", sites=SITES)
        resumed_run = run_with_oort(tmp_path / "parts", saved or fresh_state(), stop)
    assert resumed_run.devices == uninterrupted.devices
    assert len({metrics.asked for metrics in uninterrupted.devices.values()}) > 1
    assert torch.equal(resumed_run.adapter["x"].b, uninterrupted.adapter["x"].b)


def test_sites_fit_the_memory_of_each_device() -> None:
    selector = SiteSelector(costs=table({"x": (100, 10), "y": (60, 10)}), runtime_bytes=0, memory_factor=2**20)
    federated = strategy(selection=Sample(size=3, seed=0), method=selector)
    large, medium, small = (device(name, memory_gib=gib) for name, gib in (("a", 1.0), ("b", 0.08), ("c", 0.05)))
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    messages = federated.configure_train(1, start, ConfigRecord(), CohortGrid([large, medium, small], perform))
    plans = [records.request_from_records("train", message.content).plan for message in messages]
    assert plans == [replace(PLAN, round=1), replace(PLAN, round=1, sites=("y",))]
