"""Each selection against its rule, said in another way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.selection import DeviceCandidate, DeviceCandidates
from strategies.selection.deadline import Deadline
from strategies.selection.eligible import ALL_DEVICES, Eligibility
from strategies.selection.energy import Energy, power
from strategies.selection.energy_delay import EnergyDelay, merit
from strategies.selection.everyone import Everyone
from strategies.selection.loss_fair import PowerOfChoice
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from tests.helpers.candidates import asked_in, candidate, candidates
from tests.helpers.fleet import REPORT

SIZE = 3
SETTINGS = OortSettings()
ONE_TURN_PER_PICTURE = {
    "everyone": Everyone(),
    "sample": Sample(size=SIZE, seed=1),
    "round_robin": RoundRobin(size=SIZE),
    "oort": Oort(size=SIZE, seed=1, settings=SETTINGS),
    "energy": Energy(size=SIZE, seed=1, weight=0.25, settings=SETTINGS),
    "deadline": Deadline(size=SIZE, seconds=2.0, more=2.0, seed=1),
    "loss_fair": PowerOfChoice(size=SIZE, more=2.0, seed=1),
    "thrifty": EnergyDelay(size=SIZE, more=2.0, seed=1),
}
FOUND = st.fixed_dictionaries(
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
MANY = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), FOUND, max_size=8)


@pytest.mark.parametrize("name", ONE_TURN_PER_PICTURE)
@given(found=MANY, round=st.integers(7, 60), losses=st.lists(st.floats(0, 10), max_size=60))
def test_what_every_selection_does(
    name: str, found: dict[str, dict[str, object]], round: int, losses: list[float]
) -> None:
    """Sorted names of those who are there, as many as it is to ask, whatever the order in which they are told."""
    devices = DeviceCandidates(candidates(**found), losses, round=round)
    chosen = ONE_TURN_PER_PICTURE[name].select(devices, draw=round)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(devices)
    if name != "everyone":
        assert len(chosen) == min(SIZE, len(devices))
    turned = DeviceCandidates(dict(reversed(devices.items())), losses, round=round)
    assert ONE_TURN_PER_PICTURE[name].select(turned, draw=round) == chosen


@pytest.mark.parametrize("name", ["sample", "oort", "energy", "deadline", "loss_fair", "thrifty"])
def test_chance_follows_the_seed_and_the_draw(name: str) -> None:
    devices = candidates(**{f"d{i:02d}": {} for i in range(40)})
    made = {
        "sample": lambda seed: Sample(size=5, seed=seed),
        "oort": lambda seed: Oort(size=5, seed=seed, settings=SETTINGS),
        "energy": lambda seed: Energy(size=5, seed=seed, weight=0.25, settings=SETTINGS),
        "deadline": lambda seed: Deadline(size=5, seconds=2.0, more=2.0, seed=seed),
        "loss_fair": lambda seed: PowerOfChoice(size=5, more=2.0, seed=seed),
        "thrifty": lambda seed: EnergyDelay(size=5, more=2.0, seed=seed),
    }[name]
    assert made(1).select(devices, draw=3) == made(1).select(devices, draw=3)
    assert len({tuple(made(1).select(devices, draw=number)) for number in range(1, 21)}) > 10
    assert len({tuple(made(seed).select(devices, draw=3)) for seed in range(20)}) > 10


def test_turns_are_fair() -> None:
    """Seven devices, three a round: after 14 rounds each was asked six times, whatever their names."""
    devices = candidates(**{name: {} for name in "gabfced"})
    counts = dict.fromkeys(devices, 0)
    for number in range(1, 15):
        chosen = RoundRobin(size=3).select(devices, draw=number)
        devices = asked_in(devices, chosen, number)
        for name in chosen:
            counts[name] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts.values()) == {6}  # a Gini coefficient of 0


def test_turns_go_by_count_then_by_age_then_by_name() -> None:
    devices = candidates(a={"asked": 2, "last": 2}, b={"asked": 1, "last": 4}, c={"asked": 1, "last": 3}, d={}, e={})
    assert [RoundRobin(size=size).select(devices, draw=5) for size in (1, 2, 3, 4)] == [
        ["d"],
        ["d", "e"],
        ["c", "d", "e"],
        ["b", "c", "d", "e"],
    ]


def test_a_deadline_asks_those_who_make_it_and_do_most_in_a_second() -> None:
    devices = candidates(
        late={"seconds": 11.0, "steps": 99},
        later={"seconds": 12.0, "steps": 99},
        slow={"seconds": 9.0, "steps": 9},
        fast={"seconds": 4.0, "steps": 8},
        short={"seconds": 1.0, "steps": 1},
    )
    order = ["fast", "short", "slow", "late", "later"]  # 2, 1 and 1 steps a second: names break ties; the least late
    for size in range(1, 6):
        rule = Deadline(size=size, seconds=10.0, more=5.0, seed=1)
        assert rule.select(devices, draw=1) == sorted(order[:size])


def test_thrifty_asks_those_that_take_least_time_and_energy_for_what_they_train() -> None:
    costs = {"slow": (8.0, 1.0), "hungry": (1.0, 9.0), "best": (2.0, 2.0), "free": (1.0, 0.0), "worst": (9.0, 9.0)}
    devices = candidates(**{name: {"seconds": s, "joules": j} for name, (s, j) in costs.items()})
    order = sorted(costs, key=lambda name: costs[name][0] * costs[name][1])
    for size in range(1, 6):
        assert EnergyDelay(size=size, more=5.0, seed=1).select(devices, draw=1) == sorted(order[:size])
    assert merit(candidate(seconds=4.0, joules=4.0, steps=2)) == pytest.approx(merit(devices["best"]))


def test_loss_fair_asks_the_highest_losses_and_first_those_it_does_not_know() -> None:
    told = {"low": 0.1, "high": 3.0, "middle": 1.0}
    devices = candidates(new={}, **{name: {"asked": 1, "last": 1, "loss": loss} for name, loss in told.items()})
    order = ["new", "high", "middle", "low"]
    for size in range(1, 5):
        assert PowerOfChoice(size=size, more=4.0, seed=1).select(devices, draw=2) == sorted(order[:size])


def test_of_as_many_drawn_as_are_wanted_nobody_is_left_out() -> None:
    """Then it is a random sample: over rounds everybody comes."""
    devices = candidates(**{f"d{i}": {"asked": 1, "last": 1, "loss": float(i)} for i in range(10)})
    even = {
        name for number in range(60) for name in PowerOfChoice(size=2, more=1.0, seed=1).select(devices, draw=number)
    }
    assert even == set(devices)
    assert PowerOfChoice(size=2, more=5.0, seed=1).select(devices, draw=1) == ["d8", "d9"]


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ({}, 1.0),
        ({"battery": 0.6}, 0.6),
        ({"battery": 0.6, "battery_wh": 10.0}, 0.4),
        ({"battery": 0.6, "battery_wh": 10.0, "charging": True}, 1.0),
        ({"battery": 0.2, "battery_wh": 1.0}, 0.0),
    ],
)
def test_power_is_what_the_round_leaves_of_a_battery(told: dict[str, float], left: float) -> None:
    assert power(candidate(joules=7200.0, **told)) == pytest.approx(left)


def test_energy_prefers_full_batteries_and_utility_by_its_weight() -> None:
    """Two of equal loss and speed differ by their batteries alone; without a weight on them, by chance alone."""
    same = {"asked": 1, "last": 1, "loss": 1.0}
    devices = candidates(**{f"d{i}": same | {"battery": 0.2 if i < 5 else 1.0} for i in range(10)})
    settings = OortSettings(exploration=0.1, least=0.1)

    def full(weight: float) -> float:
        rule = Energy(size=5, seed=1, weight=weight, settings=settings)
        asked = [name for number in range(2, 42) for name in rule.select(devices, draw=number)]
        return sum(name >= "d5" for name in asked) / len(asked)

    assert full(0.0) == full(0.25) == 1.0  # no empty one has 95 % of what the fifth best has
    assert 0.4 < full(1.0) < 0.6


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
def test_eligible_is_a_conjunction(rule: Eligibility, battery: float | None, told: tuple[bool, ...]) -> None:
    charging, busy, hot, metered, pictures = told
    report = replace(REPORT, battery=battery, charging=charging, busy=busy, hot=hot, metered=metered, pictures=pictures)
    wanted = (
        not (rule.idle and busy)
        and (rule.battery is None or battery is None or charging or battery >= rule.battery)
        and not (rule.cool and hot)
        and not (rule.unmetered and metered)
        and (pictures or not rule.pictures)
    )
    assert rule(report) == wanted == (list(rule.against(report)) == [])
    assert ALL_DEVICES(report)
    assert rule.uses_transient_state == (rule != ALL_DEVICES)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RoundRobin(size=0),
        lambda: Oort(size=0, seed=1, settings=SETTINGS),
        lambda: Energy(size=1, seed=1, weight=1.5, settings=SETTINGS),
        lambda: PowerOfChoice(size=1, more=0.5, seed=1),
        lambda: Deadline(size=1, seconds=0.0, more=1.0, seed=1),
        lambda: Deadline(size=0, seconds=1.0, more=1.0, seed=1),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]


def test_a_candidate_that_was_never_asked() -> None:
    one: DeviceCandidate = candidate()
    assert (one.asked, one.last, one.loss) == (0, 0, None)
