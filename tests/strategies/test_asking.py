"""Who is asked to train, by what is known of the devices: through the strategy, and through the real loop."""

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
from conf.compose import compose
from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import Update
from protocol.tensor_codec import encode
from server.rounds import checkpoint
from server.rounds.loop import run_rounds
from server.rounds.state import RunState
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.ffa import FFA
from strategies.build import build
from strategies.central_dp import BudgetExhausted
from strategies.planning.plan import PlanLimits
from strategies.planning.site_selection import SiteSelector
from strategies.round.connected_devices import ConnectedDevices
from strategies.selection import Selection
from strategies.selection.deadline import Deadline
from strategies.selection.eligible import Eligibility
from strategies.selection.energy import Energy
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from strategies.strategy import Federated
from tests.helpers.central import BUDGET, central_dp, poisson, private
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, fresh_state, handle, perform, strategy
from tests.strategies.planning.test_knapsack import table

SETTINGS = OortSettings(window=1)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


class Clock:
    """That a test sets."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, until: float) -> None:
        self.time = until


def device(name: str, **told: Any) -> FakeDevice:
    return FakeDevice(name, report=replace(REPORT, device=name, **told))


def train(federated: Federated, devices: Iterable[FakeDevice], round: int = 1) -> list[str]:
    """Names of those that a round asked."""
    grid = CohortGrid(list(devices), perform)
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    messages = list(federated.configure_train(round, start, ConfigRecord(), grid))
    federated.aggregate_train(round, grid.send_and_receive(messages))
    reports = federated.query(grid)
    return sorted(reports[message.metadata.dst_node_id].device for message in messages)


def test_only_those_who_are_eligible_are_drawn_from() -> None:
    devices = [device(name, busy=name in "ace") for name in "abcdef"]
    federated = strategy(selection=Sample(size=2, seed=0), eligible=Eligibility(idle=True))
    asked = [train(federated, devices, number) for number in range(1, 9)]
    assert all(len(names) == 2 for names in asked)
    assert {name for names in asked for name in names} == set("bdf")


def test_nobody_eligible_keeps_the_adapter(tmp_path: Path) -> None:
    grid = CohortGrid([device("a", hot=True), device("b", battery=0.2)], perform)
    federated = strategy(eligible=Eligibility(cool=True, battery=0.4))
    state = run_rounds(
        grid=grid, strategy=federated, state=fresh_state(), rounds=2, checkpoints=tmp_path, on_round=lambda _: None
    )
    assert [done.train and (done.train.asked, done.train.replied) for done in state.history] == [None, (0, 0), (0, 0)]
    assert torch.equal(state.adapter["x"].a, fresh_state().adapter["x"].a)


@pytest.mark.parametrize("secret", [True, False])
def test_with_privacy_per_device_nobody_stands_in_for_those_who_are_not(tmp_path: Path, secret: bool) -> None:
    """A busy device changes nothing for the others: neither who is drawn, nor the divisor."""
    chosen: dict[str, Any] = {"selection": Sample(size=3, seed=0)}
    if secret:
        level = {"budget": replace(BUDGET, participations=None), "sampling_rate": 0.5}
        chosen = {"selection": poisson(0.5), "level": level}
    drawn, asked = (
        private(tmp_path / name, eligible=Eligibility(idle=True), **chosen) for name in ("everybody idle", "two busy")
    )
    left_out = 0
    for number in (1, 2, 3):
        everybody = train(drawn, [device(name) for name in "abcdef"], number)
        found = train(asked, [device(name, busy=name in "bd") for name in "abcdef"], number)
        assert found == [name for name in everybody if name not in "bd"]
        left_out += len(everybody) - len(found)
        assert asked.trained is not None
        assert asked.trained.central is not None
        assert asked.trained.central.deviation == drawn.trained.central.deviation  # type: ignore[union-attr]
    assert left_out


UNABLE = {
    "busy": {"busy": True},
    "no such sites": {"sites": ("z",)},
    "too low a rank": {"rank": 1},
}
FAST = OortSettings(window=1, exploration=0.3, least=0.3)
LATER: dict[str, Callable[[], Selection]] = {
    "round robin": lambda: RoundRobin(size=2),
    "oort": lambda: Oort(size=2, seed=3, settings=FAST),
    "sample": lambda: Sample(size=2, seed=0),
    "thrifty": lambda: EnergyDelay(size=2, more=2.0, seed=0),
    "deadline": lambda: Deadline(size=2, seconds=1.0, more=2.0, seed=0),
}


@pytest.mark.parametrize("unable", UNABLE)
@pytest.mark.parametrize("chosen", LATER)
def test_with_privacy_per_device_one_that_cannot_be_asked_moves_nobody_elses_turn(
    tmp_path: Path, chosen: str, unable: str
) -> None:
    """Neither now nor in later rounds: it has had its turn and has paid for it, up to its cap."""
    schedules: list[list[list[str]]] = []
    for name, told in (("able", {}), ("unable", UNABLE[unable])):
        federated = private(tmp_path / name, selection=LATER[chosen](), eligible=Eligibility(idle=True))
        devices = [device(name, examples_per_second=1.0 + ord(name) % 5) for name in "acde"]
        fleet = [*devices, device("b", **told)]
        schedules.append([])
        with suppress(BudgetExhausted):
            for number in range(1, 9):
                schedules[-1].append(train(federated, fleet, number))
        assert federated.central_dp is not None
        paid = federated.central_dp.ledger.participations()
        assert paid == {name: facts.asked for name, facts in federated._history.devices.items()}
        assert max(paid.values()) == BUDGET.participations
    eligible_nodes, others = schedules
    assert others == [[name for name in names if name != "b"] for names in eligible_nodes]
    assert eligible_nodes != others


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": Energy(size=2, seed=0, weight=0.5, settings=SETTINGS)},
        {"limits": PlanLimits(battery_share=0.5)},
    ],
)
def test_what_belongs_to_a_device_decides_nothing_where_it_is_the_unit(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="part of what is private"):
        private(tmp_path, **changes)


def test_a_metered_link_decides_nothing_where_it_is_the_unit(tmp_path: Path) -> None:
    """A lower rank goes up sooner, and would have been drawn instead of another."""
    with pytest.raises(ValueError, match="part of what is private"):
        private(tmp_path, aggregation=FFA(), limits=PlanLimits(metered_rank=1))
    with pytest.raises(ValueError, match="part of what is private"):
        private(tmp_path, aggregation=FFA(), limits=PlanLimits(metered_update="int4"))
    for level, most in (("device", None), ("none", 4)):
        config = compose(f"aggregation=ffa privacy={level} adapter.shared.rank=3")
        ledger = central_dp(tmp_path).ledger
        assert build(config, PLAN, SITES, accept_simulated=True, ledger=ledger)._limits.metered_rank == most
    config = compose("aggregation=ffa privacy=device adapter.shared.rank=3 compression.metered_upload=int4")
    with pytest.raises(AntherError, match=r"compression\.metered_upload=int4: what link a device is on belongs to it"):
        build(config, PLAN, SITES, accept_simulated=True, ledger=ledger)


def test_old_reports_are_asked_for_again_where_they_matter() -> None:
    clock, devices = Clock(), [device("a"), device("b")]
    federated = strategy(eligible=Eligibility(idle=True), clock=clock, report_age=60.0)
    assert train(federated, devices, 1) == ["a", "b"]
    clock.time, devices[0].report = 59.0, replace(devices[0].report, busy=True)
    assert train(federated, devices, 2) == ["a", "b"]  # nobody knows yet
    assert [one.heard.count("Query") for one in devices] == [1, 1]
    clock.time = 61.0
    assert train(federated, devices, 3) == ["b"]
    assert [one.heard.count("Query") for one in devices] == [2, 2]
    blind = strategy(clock=clock, report_age=60.0)
    for _ in range(2):
        train(blind, devices)
        clock.time += 1000.0
    assert [one.heard.count("Query") for one in devices] == [3, 3]


def test_who_is_at_work_is_not_asked_how_it_is() -> None:
    clock, devices = Clock(), [device("a"), device("b")]
    federated = strategy(eligible=Eligibility(idle=True), clock=clock, report_age=60.0)
    train(federated, devices, 1)
    clock.time, federated.busy_nodes = 100.0, {1}
    assert train(federated, devices, 2) == ["b"]
    assert [one.heard.count("Query") for one in devices] == [1, 2]
    federated.busy_nodes = set()
    train(federated, devices, 3)
    assert [one.heard.count("Query") for one in devices] == [2, 2]


def test_who_does_not_answer_anew_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep: set[str] = set()

    def sleepy(request: Any, device: FakeDevice) -> Generator[Any, Any, Any]:
        if device.name in asleep:
            raise RuntimeError("asleep")
        return (yield from handle(request, device))

    monkeypatch.setattr("simulations.grid.cohort.handle", sleepy)
    clock, devices = Clock(), [FakeDevice("a"), FakeDevice("b")]
    federated = strategy(eligible=Eligibility(idle=True), clock=clock, report_age=60.0)
    for sleeping, asked in ((set(), ["a", "b"]), ({"a"}, ["b"]), (set(), ["a", "b"])):
        asleep.clear()
        asleep.update(sleeping)
        assert train(federated, devices) == asked
        clock.time += 100.0


@pytest.mark.parametrize("chosen", LATER)
def test_with_privacy_per_device_one_that_is_silent_moves_nobody_elses_turn(
    tmp_path: Path, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep: set[str] = set()

    def sleepy(request: Any, device: FakeDevice) -> Generator[Any, Any, Any]:
        if device.name in asleep:
            raise RuntimeError("asleep")
        return (yield from handle(request, device))

    monkeypatch.setattr("simulations.grid.cohort.handle", sleepy)
    schedules: list[list[list[str]]] = []
    for name, sleeping in (("awake", set()), ("asleep", {"b"})):
        clock, fleet = Clock(), [device(name, examples_per_second=1.0 + ord(name) % 5) for name in "abcde"]
        settings: dict[str, Any] = {"eligible": Eligibility(idle=True), "clock": clock, "report_age": 60.0}
        federated = private(tmp_path / name, selection=LATER[chosen](), **settings)
        asleep.clear()
        schedules.append([])
        with suppress(BudgetExhausted):
            for number in range(1, 9):
                schedules[-1].append(train(federated, fleet, number))
                asleep |= sleeping
                clock.time += 100.0
        assert sorted(report.device for report in federated.query(CohortGrid(fleet, perform)).values()) == list("abcde")
    awake, others = schedules
    assert others == [awake[0], *([name for name in names if name != "b"] for names in awake[1:])]
    assert awake != others


def test_a_name_stays_with_the_node_that_came_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """Also while that is silent; once it has left, whoever has the name is taken for it."""
    roster = ConnectedDevices(REPORT.base)
    one, other = (replace(REPORT, device=name) for name in "ab")
    roster.update_report(1, one, now=0.0)
    roster.update_report(2, other, now=0.0)
    roster.mark_stale(before=1.0)
    assert roster.nodes_to_query({1, 2, 3}) == [1, 2, 3]
    roster.update_report(3, one, now=2.0)
    roster.update_report(2, one, now=2.0)
    roster.update_report(1, replace(REPORT, device="c"), now=2.0)
    assert caplog.text.count("which calls itself 'a', is not asked: its name is taken") == 2
    assert "which calls itself 'c', is not asked: it was 'a' before" in caplog.text
    assert (roster.reports, roster.stale) == ({1: one, 2: other}, {1, 2})
    roster.update_report(2, other, now=2.0)
    assert (roster.nodes_to_query({1, 2, 3}), roster.stale) == ([1], {1})
    assert roster.nodes_to_query({2, 3}) == [3]
    roster.update_report(3, one, now=3.0)
    assert roster.reports == {2: other, 3: one}
    assert not roster.stale


class Enrolled(CohortGrid):
    """Whose nodes were registered under names, whatever their devices call themselves."""

    def __init__(self, devices: list[FakeDevice]) -> None:
        super().__init__(devices, perform)  # type: ignore[arg-type]
        self.registered = {node: device.name for node, device in self._devices.items()}

    def names(self) -> dict[int, str]:
        return self.registered

    def query_nodes(self, messages: Any, *, timeout: float, wait: float) -> Any:
        assert 0 < wait < timeout
        return self.send_and_receive(messages)


def test_a_name_belongs_to_the_key_that_was_enrolled_under_it(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever comes first with another's name is refused, and the other one is in, with its own history."""
    calls_itself = {"ada": "ada", "mallory": "ada", "zoe": "sybil-1"}
    devices = [FakeDevice(name, report=replace(REPORT, device=told)) for name, told in calls_itself.items()]
    grid, federated = Enrolled(devices), strategy()
    grid._devices = dict(sorted(grid._devices.items(), key=lambda one: -one[0]))  # ada is heard last
    assert [report.device for report in federated.query(grid).values()] == ["ada"]
    assert "calls itself 'ada', is not asked: its key was registered as 'mallory'" in caplog.text
    assert "calls itself 'sybil-1', is not asked: its key was registered as 'zoe'" in caplog.text
    assert list(federated.query(grid)) == [1]  # the others aren't asked again and again
    federated._roster.nodes_to_query({1}, now=0.0)  # they left, and are back, under their own names
    for device in devices:
        device.report = replace(REPORT, device=device.name)
    assert [report.device for report in federated.query(grid).values()] == ["ada", "mallory", "zoe"]


def test_who_was_refused_is_asked_again_after_a_while() -> None:
    roster = ConnectedDevices(REPORT.base)
    roster.nodes_to_query({1}, now=0.0)
    roster.update_report(1, replace(REPORT, device="x"), now=0.0, registered="a")
    assert roster.nodes_to_query({1}, now=599.0) == []
    assert roster.nodes_to_query({1}, now=601.0) == [1]


@pytest.mark.parametrize(
    "lie", [{"watts": 1e6}, {"examples_per_second": 1e-5}, {"memory_gib": float("nan")}, {"memory_gib": -1.0}]
)
def test_a_report_that_no_device_can_have_is_refused(lie: dict[str, float]) -> None:
    roster = ConnectedDevices(REPORT.base)
    roster.update_report(1, replace(REPORT, device="a", **lie), now=0.0)
    assert roster.reports == {}


def test_a_liar_s_events_are_its_own() -> None:
    """Whom the server echoes two thousand million events to is the one that told of them."""

    def lies(reply: Any) -> Any:
        return replace(reply, events=2_000_000_000) if isinstance(reply, Update) else reply

    mallory = FakeDevice("mallory", misbehave=lies)
    grid, federated, echoes = Enrolled([FakeDevice("ada"), mallory]), strategy(), {}
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    for number in (1, 2):
        asked = list(federated.configure_train(number, start, ConfigRecord(), grid))
        for message in asked:
            request = records.request_from_records("train", message.content)
            echoes[grid.registered[message.metadata.dst_node_id]] = request.echo
        federated.aggregate_train(number, grid.send_and_receive(asked))
    assert echoes == {"ada": 3, "mallory": 2_000_000_000}


def test_a_server_remembers_whom_it_asked_and_what_they_told() -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError

    federated = strategy(selection=RoundRobin(size=2))
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=fails), FakeDevice("c")]
    assert [train(federated, devices, number) for number in (1, 2, 3)] == [["a", "b"], ["a", "c"], ["b", "c"]]
    known = federated._history.devices
    assert {name: (facts.asked, facts.last, facts.loss) for name, facts in known.items()} == {
        "a": (2, 2, 0.5),
        "b": (2, 3, None),
        "c": (2, 3, 0.5),
    }
    assert known["b"].steps == 0


def resumed(folder: Path, state: RunState, rounds: int) -> RunState:
    federated = strategy(selection=Oort(size=2, seed=3, settings=SETTINGS))
    grid = CohortGrid([device(name, examples_per_second=1.0 + ord(name) % 5) for name in "abcdefg"], perform)
    return run_rounds(
        grid=grid, strategy=federated, state=state, rounds=rounds, checkpoints=folder, on_round=lambda _: None
    )


def test_a_resumed_run_chooses_the_same(tmp_path: Path) -> None:
    """What Oort goes by is in the checkpoint: whom it asked when, what they told, and the pacer's rounds."""
    whole = resumed(tmp_path / "whole", fresh_state(), 6)
    for stop in (2, 4, 6):
        saved = checkpoint.load(tmp_path / "parts", sites=SITES)
        parts = resumed(tmp_path / "parts", saved or fresh_state(), stop)
    assert parts.devices == whole.devices
    assert len({facts.asked for facts in whole.devices.values()}) > 1
    assert torch.equal(parts.adapter["x"].b, whole.adapter["x"].b)


def test_devices_get_sites_that_they_can_hold_and_who_can_hold_none_is_not_asked() -> None:
    fitting = SiteSelector(costs=table({"x": (100, 10), "y": (60, 10)}), runtime_bytes=0, memory=2**20)
    federated = strategy(selection=Sample(size=3, seed=0), fitting=fitting)
    plenty, some, few = (device(name, memory_gib=gib) for name, gib in (("a", 1.0), ("b", 0.08), ("c", 0.05)))
    start = records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    messages = federated.configure_train(1, start, ConfigRecord(), CohortGrid([plenty, some, few], perform))
    plans = [records.request_from_records("train", message.content).plan for message in messages]
    assert plans == [replace(PLAN, round=1), replace(PLAN, round=1, sites=("y",))]
