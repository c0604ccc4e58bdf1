"""Noise is derived from the sensitivity of a sum."""

import math

import pytest
import torch

from privacy.accounting import DEVICE
from privacy.noise import SecureNoise, SimulatedNoise
from privacy.sensitivity import MAX_NOISE_MULTIPLIER, RESOLUTION, BoundedVectorSum, Sensitivity

ONE = Sensitivity(norm=0.5, unit=DEVICE)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_invalid_sensitivity_is_rejected(norm):
    with pytest.raises(ValueError, match="sensitivity="):
        Sensitivity(norm=norm, unit=DEVICE)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan, 1.01 * MAX_NOISE_MULTIPLIER])
def test_invalid_noise_multiplier_is_rejected(sigma):
    with pytest.raises(ValueError, match="noise_multiplier="):
        ONE.noise_stddev(sigma)


def test_stddev_is_sigma_times_the_norm():
    assert ONE.noise_stddev(3.0) == 1.5


def test_noise_statistics():
    """Mean, standard deviation and independence of secure noise."""
    steps = torch.arange(200_000)
    noise = BoundedVectorSum(steps, ONE).add_noise(3.0, SecureNoise()) - steps * (ONE.norm / RESOLUTION)
    assert float(noise.mean()) == pytest.approx(0.0, abs=5 * 1.5 / 200_000**0.5)
    assert float(noise.std()) == pytest.approx(1.5, rel=0.01)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 * 1.5**2 / 200_000**0.5
    assert float((noise.abs() > 2 * 1.5).double().mean()) == pytest.approx(0.0455, abs=0.003)


def test_each_release_has_fresh_noise():
    value = torch.zeros(4, dtype=torch.int64)
    assert not torch.equal(
        BoundedVectorSum(value, ONE).add_noise(1.0, SecureNoise()),
        BoundedVectorSum(value, ONE).add_noise(1.0, SecureNoise()),
    )
    source = SimulatedNoise(seed=0, client="server", round=1, purpose="updates")
    assert not torch.equal(
        BoundedVectorSum(value, ONE).add_noise(1.0, source), BoundedVectorSum(value, ONE).add_noise(1.0, source)
    )
