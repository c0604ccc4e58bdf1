"""Selections against independent formulations of their rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.selection import DeviceCandidate, DeviceCandidates, amplifies, uses_transient_state
from strategies.selection.deadline import Deadline
from strategies.selection.eafl import EAFL, remaining_charge
from strategies.selection.eligible import ALL_DEVICES, Eligibility
from strategies.selection.energy_delay import EnergyDelay, merit
from strategies.selection.everyone import Everyone
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.power_of_choice import PowerOfChoice
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from tests.helpers.candidates import asked_in, candidate, candidates
from tests.helpers.central import poisson
from tests.helpers.fleet import REPORT

SIZE = 3
SETTINGS = OortSettings()
RULES = {
    "everyone": Everyone(),
    "random": Sample(size=SIZE, seed=1),
    "round_robin": RoundRobin(size=SIZE),
    "oort": Oort(size=SIZE, seed=1, settings=SETTINGS),
    "eafl": EAFL(size=SIZE, seed=1, utility_weight=0.25, settings=SETTINGS),
    "deadline": Deadline(size=SIZE, deadline=2.0, candidate_factor=2.0, seed=1),
    "power_of_choice": PowerOfChoice(size=SIZE, candidate_factor=2.0, seed=1),
    "energy_delay": EnergyDelay(size=SIZE, candidate_factor=2.0, seed=1),
}
SETTINGS_OF = st.fixed_dictionaries(
    {
        "asked": st.integers(0, 5),
        "last": st.integers(1, 6),
        "loss": st.none() | st.floats(0, 10),
        "seconds": st.floats(0.01, 100),
        "joules": st.floats(0, 1e4),
        "battery": st.sampled_from([None, 0.0, 0.4, 1.0]),
        "battery_wh": st.sampled_from([None, 0.5, 15.0]),
        "charging": st.booleans(),
    }
)
DEVICES = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), SETTINGS_OF, max_size=8)


@pytest.mark.parametrize("name", RULES)
@given(settings=DEVICES, round=st.integers(7, 60), losses=st.lists(st.floats(0, 10), max_size=60))
def test_properties_of_every_selection(
    name: str, settings: dict[str, dict[str, object]], round: int, losses: list[float]
) -> None:
    """Sorted names of candidates, as many as requested, independent of the order of the candidates."""
    devices = DeviceCandidates(candidates(**settings), losses, round=round)
    selected = RULES[name].select(devices, draw=round)
    assert selected == sorted(set(selected))
    assert set(selected) <= set(devices)
    if name != "everyone":
        assert len(selected) == min(SIZE, len(devices))
    reversed_devices = DeviceCandidates(dict(reversed(devices.items())), losses, round=round)
    assert RULES[name].select(reversed_devices, draw=round) == selected


@pytest.mark.parametrize("name", ["random", "oort", "eafl", "deadline", "power_of_choice", "energy_delay"])
def test_random_selections_depend_on_seed_and_draw(name: str) -> None:
    devices = candidates(**{f"d{i:02d}": {} for i in range(40)})
    make_rule = {
        "random": lambda seed: Sample(size=5, seed=seed),
        "oort": lambda seed: Oort(size=5, seed=seed, settings=SETTINGS),
        "eafl": lambda seed: EAFL(size=5, seed=seed, utility_weight=0.25, settings=SETTINGS),
        "deadline": lambda seed: Deadline(size=5, deadline=2.0, candidate_factor=2.0, seed=seed),
        "power_of_choice": lambda seed: PowerOfChoice(size=5, candidate_factor=2.0, seed=seed),
        "energy_delay": lambda seed: EnergyDelay(size=5, candidate_factor=2.0, seed=seed),
    }[name]
    assert make_rule(1).select(devices, draw=3) == make_rule(1).select(devices, draw=3)
    assert len({tuple(make_rule(1).select(devices, draw=number)) for number in range(1, 21)}) > 10
    assert len({tuple(make_rule(seed).select(devices, draw=3)) for seed in range(20)}) > 10


def test_round_robin_is_fair() -> None:
    """Seven devices, three per round: after 14 rounds each was selected six times."""
    devices = candidates(**{name: {} for name in "gabfced"})
    counts = dict.fromkeys(devices, 0)
    for number in range(1, 15):
        selected = RoundRobin(size=3).select(devices, draw=number)
        devices = asked_in(devices, selected, number)
        for name in selected:
            counts[name] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts.values()) == {6}  # a Gini coefficient of 0


def test_round_robin_order() -> None:
    devices = candidates(a={"asked": 2, "last": 2}, b={"asked": 1, "last": 4}, c={"asked": 1, "last": 3}, d={}, e={})
    assert [RoundRobin(size=size).select(devices, draw=5) for size in (1, 2, 3, 4)] == [
        ["d"],
        ["d", "e"],
        ["c", "d", "e"],
        ["b", "c", "d", "e"],
    ]


def test_deadline_order() -> None:
    devices = candidates(
        late={"seconds": 11.0, "steps": 99},
        later={"seconds": 12.0, "steps": 99},
        slow={"seconds": 9.0, "steps": 9},
        fast={"seconds": 4.0, "steps": 8},
        short={"seconds": 1.0, "steps": 1},
    )
    order = [
        "fast",
        "short",
        "slow",
        "late",
        "later",
    ]  # 2, 1 and 1 steps per second, names break ties; then the least late
    for size in range(1, 6):
        rule = Deadline(size=size, deadline=10.0, candidate_factor=5.0, seed=1)
        assert rule.select(devices, draw=1) == sorted(order[:size])


def test_energy_delay_order() -> None:
    costs = {"slow": (8.0, 1.0), "hungry": (1.0, 9.0), "best": (2.0, 2.0), "free": (1.0, 0.0), "worst": (9.0, 9.0)}
    devices = candidates(**{name: {"seconds": s, "joules": j} for name, (s, j) in costs.items()})
    order = sorted(costs, key=lambda name: costs[name][0] * costs[name][1])
    for size in range(1, 6):
        assert EnergyDelay(size=size, candidate_factor=5.0, seed=1).select(devices, draw=1) == sorted(order[:size])
    assert merit(candidate(seconds=4.0, joules=4.0, steps=2)) == pytest.approx(merit(devices["best"]))


def test_power_of_choice_order() -> None:
    losses = {"low": 0.1, "high": 3.0, "middle": 1.0}
    devices = candidates(new={}, **{name: {"asked": 1, "last": 1, "loss": loss} for name, loss in losses.items()})
    order = ["new", "high", "middle", "low"]
    for size in range(1, 5):
        assert PowerOfChoice(size=size, candidate_factor=4.0, seed=1).select(devices, draw=2) == sorted(order[:size])


def test_candidate_factor_one_is_a_random_sample() -> None:
    """It is a random sample then: over rounds, every device is selected."""
    devices = candidates(**{f"d{i}": {"asked": 1, "last": 1, "loss": float(i)} for i in range(10)})
    selected_names = {
        name
        for number in range(60)
        for name in PowerOfChoice(size=2, candidate_factor=1.0, seed=1).select(devices, draw=number)
    }
    assert selected_names == set(devices)
    assert PowerOfChoice(size=2, candidate_factor=5.0, seed=1).select(devices, draw=1) == ["d8", "d9"]


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({}, 1.0),
        ({"battery": 0.6}, 0.6),
        ({"battery": 0.6, "battery_wh": 10.0}, 0.4),
        ({"battery": 0.6, "battery_wh": 10.0, "charging": True}, 1.0),
        ({"battery": 0.2, "battery_wh": 1.0}, 0.0),
    ],
)
def test_remaining_charge(report: dict[str, float], expected: float) -> None:
    assert remaining_charge(candidate(joules=7200.0, **report)) == pytest.approx(expected)


def test_eafl_prefers_full_batteries() -> None:
    """Devices with equal loss and speed differ by battery; with utility weight 1, by chance."""
    equal = {"asked": 1, "last": 1, "loss": 1.0}
    devices = candidates(**{f"d{i}": equal | {"battery": 0.2 if i < 5 else 1.0} for i in range(10)})
    settings = OortSettings(exploration=0.1, min_exploration=0.1)

    def fraction_full(weight: float) -> float:
        rule = EAFL(size=5, seed=1, utility_weight=weight, settings=settings)
        asked = [name for number in range(2, 42) for name in rule.select(devices, draw=number)]
        return sum(name >= "d5" for name in asked) / len(asked)

    assert fraction_full(0.0) == fraction_full(0.25) == 1.0  # no empty battery reaches 95 % of the fifth best reward
    assert 0.4 < fraction_full(1.0) < 0.6


@given(
    st.builds(
        Eligibility,
        idle=st.booleans(),
        battery=st.none() | st.sampled_from([0.2, 0.6, 1.0]),
        cool=st.booleans(),
        unmetered=st.booleans(),
        pictures=st.booleans(),
    ),
    st.sampled_from([None, 0.0, 0.2, 0.6, 1.0]),
    st.tuples(*[st.booleans()] * 5),
)
def test_eligibility_is_a_conjunction(rule: Eligibility, battery: float | None, flags: tuple[bool, ...]) -> None:
    charging, busy, hot, metered, pictures = flags
    report = replace(REPORT, battery=battery, charging=charging, busy=busy, hot=hot, metered=metered, pictures=pictures)
    expected = (
        not (rule.idle and busy)
        and (rule.battery is None or battery is None or charging or battery >= rule.battery)
        and not (rule.cool and hot)
        and not (rule.unmetered and metered)
        and (pictures or not rule.pictures)
    )
    assert rule(report) == expected == (list(rule.unmet(report)) == [])
    assert ALL_DEVICES(report)
    assert rule.uses_transient_state == (rule != ALL_DEVICES)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RoundRobin(size=0),
        lambda: Oort(size=0, seed=1, settings=SETTINGS),
        lambda: EAFL(size=1, seed=1, utility_weight=1.5, settings=SETTINGS),
        lambda: PowerOfChoice(size=1, candidate_factor=0.5, seed=1),
        lambda: Deadline(size=1, deadline=0.0, candidate_factor=1.0, seed=1),
        lambda: Deadline(size=0, deadline=1.0, candidate_factor=1.0, seed=1),
    ],
)
def test_invalid_settings_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]


def test_candidate_without_metrics() -> None:
    new_candidate: DeviceCandidate = candidate()
    assert (new_candidate.asked, new_candidate.last, new_candidate.loss) == (0, 0, None)


def test_undeclared_selection_is_assumed_to_use_device_state() -> None:
    class UndeclaredSelection:
        def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:  # noqa: ARG002
            return sorted(devices)

    assert uses_transient_state(UndeclaredSelection())  # type: ignore[arg-type]
    assert not uses_transient_state(RoundRobin(size=1))
    assert not amplifies(UndeclaredSelection())  # type: ignore[arg-type]
    assert [amplifies(rule) for rule in (RoundRobin(size=1), poisson(0.5))] == [False, True]
