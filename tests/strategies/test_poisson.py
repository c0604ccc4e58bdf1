"""Poisson sampling."""

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


@pytest.mark.parametrize("rng", [simulated, secure])
def test_devices_are_selected_independently(rng):
    selection, rounds = Poisson(rate=0.25, rng=rng), 2000
    selected = [selection.select(NAMES, draw=number) for number in range(rounds)]
    counts = Counter(name for names in selected for name in names)
    deviation = (rounds * 0.25 * 0.75) ** 0.5
    assert all(abs(counts[name] - rounds * 0.25) < 5 * deviation for name in NAMES)
    pairs = sum({NAMES[0], NAMES[1]} <= set(names) for names in selected)
    assert abs(pairs - rounds / 16) < 5 * (rounds / 16) ** 0.5
    sizes = [len(names) for names in selected]
    variance = sum((size - 10) ** 2 for size in sizes) / rounds
    assert variance == pytest.approx(40 * 0.25 * 0.75, rel=0.2)  # 0 for a fixed size


def test_rate_is_independent_of_the_devices():
    """No device is added for an absent one: with a tenth of the devices, a tenth are selected."""
    selection = Poisson(rate=0.5, rng=secure)
    selected = [len(selection.select(NAMES[:4], draw=number)) for number in range(1000)]
    assert sum(selected) == pytest.approx(2000, abs=160)
    assert 0 in selected
    assert 4 in selected


def test_only_simulated_samples_are_reproducible():
    secure_selection = Poisson(rate=0.5, rng=secure)
    assert secure_selection.select(NAMES, draw=1) != secure_selection.select(NAMES, draw=1)
    simulated_select = partial(Poisson(rate=0.5, rng=simulated).select, NAMES)
    assert simulated_select(draw=1) == simulated_select(draw=1) != simulated_select(draw=2)


def test_edges():
    assert Poisson(rate=1.0, rng=secure).select(["b", "a"], draw=1) == ["a", "b"]
    assert Poisson(rate=0.5, rng=secure).select([], draw=1) == []
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="rate="):
            Poisson(rate=rate, rng=secure)
