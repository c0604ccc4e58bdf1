"""Estimates of the signal-to-noise ratio, compared with the true ratio."""

import pytest
import torch

from privacy.snr import signal_to_noise, signal_to_spread

SIZE = 40_000


def gaussian(deviation, seed=0):
    return deviation * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_known_noise(ratio):
    signal = torch.full((SIZE,), 0.3 * ratio, dtype=torch.float64)
    assert signal_to_noise(signal + gaussian(0.3), 0.3) == pytest.approx(ratio, rel=0.05)


def test_pure_noise_has_no_signal():
    assert signal_to_noise(gaussian(0.3), 0.3) < 2 * (2 / SIZE) ** 0.25
    assert signal_to_noise(torch.zeros(SIZE), 0.3) == 0.0


@pytest.mark.parametrize("ratio", [0.5, 4.0])
def test_unknown_noise_is_estimated_from_spread(ratio):
    count, deviation = 8, 0.2
    of_mean = deviation / count**0.5
    signal = torch.full((SIZE,), of_mean * ratio, dtype=torch.float64)
    updates = [(signal + gaussian(deviation, seed)).float() for seed in range(count)]
    assert signal_to_spread(updates) == pytest.approx(ratio, rel=0.1)


def test_undefined_cases_return_none():
    one = torch.ones(3)
    assert signal_to_spread([]) is None
    assert signal_to_spread([one]) is None
    assert signal_to_spread([one, one, one]) is None
    assert signal_to_spread([one, -one]) == 0.0
