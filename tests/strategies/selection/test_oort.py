"""Parts of Oort against the formulas of the paper."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.selection import DeviceCandidate, DeviceCandidates
from strategies.selection.oort import Oort, OortSettings, above_cutoff, paced_quantile, utilities, weighted_sample
from strategies.selection.utility import quantile, system_utility, unit_range
from tests.helpers.candidates import candidates

SETTINGS = OortSettings(alpha=2.0, clip_quantile=1.0)


def test_utility_combines_loss_staleness_and_speed() -> None:
    """|B| · loss scaled to the candidates' range, √(0.1 ln R / L), and (T / t)^α."""
    known = candidates(
        low={"asked": 1, "last": 4, "loss": 1.0, "steps": 2},
        high={"asked": 3, "last": 8, "loss": 3.0, "steps": 2},
        slow={"asked": 1, "last": 4, "loss": 2.0, "steps": 2, "seconds": 20.0},
    )
    result = utilities(known, preferred=10.0, round=9, settings=SETTINGS)
    age = {last: math.sqrt(0.1 * math.log(9) / last) for last in (4, 8)}
    assert result == pytest.approx({"low": 0 + age[4], "high": 1 + age[8], "slow": (0.5 + age[4]) / 4})


def test_utility_without_losses() -> None:
    """This is the case under privacy."""
    known = candidates(a={"asked": 1, "last": 2}, b={"asked": 1, "last": 2, "seconds": 20.0}, c={"asked": 1, "last": 8})
    result = utilities(known, preferred=10.0, round=9, settings=SETTINGS)
    assert result["b"] == pytest.approx(result["a"] / 4)
    assert result["c"] == pytest.approx(result["a"] / 2)


def test_huge_loss_is_clipped() -> None:
    """The largest of ten counts as the second largest."""
    reported = {f"d{i}": {"asked": 1, "last": 1, "loss": 1e6 if i == 9 else float(i)} for i in range(10)}
    result = utilities(candidates(**reported), preferred=1.0, round=1, settings=OortSettings(clip_quantile=0.8))
    assert result["d9"] == result["d8"] == 1.0
    assert result["d4"] == pytest.approx(0.5)


@given(st.lists(st.floats(0, 1e6), max_size=9), st.floats(0.1, 1))
def test_unit_range(values: list[float], clip: float) -> None:
    result = unit_range(values, clip)
    assert len(result) == len(values)
    assert all(0 <= value <= 1 for value in result)
    assert [value for _, value in sorted(zip(values, result, strict=True))] == sorted(result)


def test_quantile_and_system_utility() -> None:
    assert [quantile([3, 1, 2, 4], fraction) for fraction in (0.0, 0.25, 0.5, 0.99)] == [1, 2, 3, 4]
    assert quantile([1.0], 1.0) == quantile([], 0.5) == math.inf
    assert [system_utility(seconds, 4.0, 2.0) for seconds in (1.0, 4.0, 8.0)] == [1.0, 1.0, 0.25]


def test_cutoff_is_relative_to_the_last_score() -> None:
    scores = {"a": 1.0, "b": 0.9, "c": 0.86, "d": 0.85, "e": 0.1}
    assert sorted(above_cutoff(scores, 2, 0.95)) == ["a", "b", "c"]
    assert sorted(above_cutoff(scores, 2, 0.5)) == ["a", "b", "c", "d"]
    assert above_cutoff(scores, 0, 0.95) == {}


def test_weighted_sample_follows_the_weights() -> None:
    """Weights 1 : 2 : 5, and a weight of 0, which is never drawn first."""
    rng = random.Random(0)
    first = [weighted_sample({"a": 1.0, "b": 2.0, "c": 5.0, "d": 0.0}, 1, rng)[0] for _ in range(4000)]
    for name, fraction in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8), ("d", 0.0)):
        assert first.count(name) / 4000 == pytest.approx(fraction, abs=0.03)
    assert weighted_sample({"a": 1.0}, 3, rng) == ["a"]
    assert weighted_sample({}, 3, rng) == []


def test_pacer_admits_slower_devices_at_constant_utility() -> None:
    """The pacer is updated after two windows and then after each window."""
    flat, steep = [1.0] * 9, [1.0, 1.0, 1.0, 10.0, 10.0, 10.0]
    assert [paced_quantile(flat[:rounds], 0.3, window=3, step=0.1) for rounds in (0, 5, 6, 8, 9)] == pytest.approx(
        [0.3, 0.3, 0.4, 0.4, 0.5]
    )
    assert paced_quantile(steep, 0.3, window=3, step=0.1) == pytest.approx(0.2)
    assert paced_quantile([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], 0.3, window=3, step=0.1) == 0.3
    assert paced_quantile([1.0] * 99, 0.3, window=3, step=0.1) == 1.0
    assert paced_quantile([10.0**i for i in range(40)], 0.3, window=1, step=0.1) == pytest.approx(0.1)


def test_exploration_decays() -> None:
    """Nine of ten devices are new in the first round, and three in the end, or more if there are no others."""
    old = {f"old{i}": {"asked": 1, "last": 1, "loss": 1.0} for i in range(20)}
    devices = candidates(**{f"new{i:02d}": {} for i in range(20)}, **old)
    rule = Oort(size=10, seed=1, settings=OortSettings())

    def count_new(devices: dict[str, DeviceCandidate], round: int) -> int:
        selected = [rule.select(DeviceCandidates(devices, round=round), draw=draw) for draw in (round, 10_000 * round)]
        (result,) = {sum(name.startswith("new") for name in names) for names in selected}  # for each draw
        return result

    assert [count_new(devices, number) for number in (1, 2, 6, 100)] == [9, 8, 8, 3]
    assert count_new({name: devices[name] for name in [*old, "new00"]}, 1) == 1
    assert count_new({name: one for name, one in devices.items() if name not in old}, 100) == 10


def test_new_devices_are_drawn_by_speed() -> None:
    devices = candidates(
        **{f"fast{i}": {"seconds": 1.0} for i in range(5)}, **{f"slow{i}": {"seconds": 100.0} for i in range(5)}
    )
    rule = Oort(size=2, seed=1, settings=OortSettings())
    selected = [name for number in range(1, 50) for name in rule.select(devices, draw=number)]
    assert sum(name.startswith("fast") for name in selected) > 0.95 * len(selected)


def test_max_selections_if_there_are_others() -> None:
    devices = candidates(
        round=10,
        a={"asked": 5, "last": 9, "loss": 99.0},
        b={"asked": 1, "last": 1, "loss": 0.0},
        c={"asked": 1, "last": 1, "loss": 0.0},
    )
    settings = OortSettings(max_selections=5, exploration=0.1, min_exploration=0.1)
    assert Oort(size=2, seed=1, settings=settings).select(devices, draw=10) == ["b", "c"]
    assert Oort(size=3, seed=1, settings=settings).select(devices, draw=10) == ["a", "b", "c"]


def test_high_losses_are_selected_more_often() -> None:
    """All devices are equally fast, and a low cutoff admits all of them."""
    devices = candidates(round=22, **{f"d{i}": {"asked": 1, "last": 1, "loss": float(i)} for i in range(10)})
    settings = OortSettings(exploration=0.1, min_exploration=0.1, cutoff=0.01)
    rule = Oort(size=3, seed=1, settings=settings)
    selected = [name for number in range(2, 22) for name in rule.select(devices, draw=number)]
    assert selected.count("d9") > 1.5 * selected.count("d1") > 0
