"""A coin for each device."""

from collections import Counter
from functools import partial

import pytest

from privacy.noise import SecureNoise, SimulatedNoise
from strategies.selection.poisson import Poisson

NAMES = [f"device {number:02d}" for number in range(40)]


def simulated(round):
    return SimulatedNoise(seed=0, client="server", round=round, purpose="selection")


def secure(_):
    return SecureNoise()


@pytest.mark.parametrize("coins", [simulated, secure])
def test_each_by_itself_with_its_rate(coins):
    chosen, rounds = Poisson(rate=0.25, coins=coins), 2000
    asked = [chosen.select(NAMES, draw=number) for number in range(rounds)]
    each = Counter(name for names in asked for name in names)
    deviation = (rounds * 0.25 * 0.75) ** 0.5
    assert all(abs(each[name] - rounds * 0.25) < 5 * deviation for name in NAMES)
    pairs = sum({NAMES[0], NAMES[1]} <= set(names) for names in asked)
    assert abs(pairs - rounds / 16) < 5 * (rounds / 16) ** 0.5
    sizes = [len(names) for names in asked]
    variance = sum((size - 10) ** 2 for size in sizes) / rounds
    assert variance == pytest.approx(40 * 0.25 * 0.75, rel=0.2)  # of a fixed size it would be 0


def test_the_rate_does_not_change_with_who_is_there():
    """Nobody is topped up: with a tenth of the devices, a tenth are asked."""
    chosen = Poisson(rate=0.5, coins=secure)
    asked = [len(chosen.select(NAMES[:4], draw=number)) for number in range(1000)]
    assert sum(asked) == pytest.approx(2000, abs=160)
    assert 0 in asked
    assert 4 in asked


def test_a_real_sample_is_not_reproducible_and_a_simulated_one_is():
    real = Poisson(rate=0.5, coins=secure)
    assert real.select(NAMES, draw=1) != real.select(NAMES, draw=1)
    tests = partial(Poisson(rate=0.5, coins=simulated).select, NAMES)
    assert tests(draw=1) == tests(draw=1) != tests(draw=2)


def test_edges():
    assert Poisson(rate=1.0, coins=secure).select(["b", "a"], draw=1) == ["a", "b"]
    assert Poisson(rate=0.5, coins=secure).select([], draw=1) == []
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="rate="):
            Poisson(rate=rate, coins=secure)
