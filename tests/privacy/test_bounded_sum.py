"""Noise is derived from the sensitivity of a sum."""

import math

import pytest
import torch

from privacy.accounting import ADD_OR_REMOVE_ONE, DEVICE
from privacy.bounded_sum import MAX_NOISE_MULTIPLIER, RESOLUTION, BoundedSum, Sensitivity
from privacy.noise import SecureNoise, SimulatedNoise

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
    assert ONE.relation == ADD_OR_REMOVE_ONE
    assert BoundedSum(torch.zeros(1), ONE).stddev(3.0) == 3 * RESOLUTION
    assert BoundedSum(torch.zeros(1), ONE, resolution=8).stddev(3.0) == 24
    assert BoundedSum(torch.zeros(1), ONE, resolution=8).step == 0.0625


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan, 1.01 * MAX_NOISE_MULTIPLIER])
def test_sum_is_not_noised_with_an_invalid_multiplier(sigma):
    with pytest.raises(ValueError, match="noise_multiplier="):
        BoundedSum(torch.zeros(1, dtype=torch.int64), ONE).add_noise(sigma, SecureNoise())


@pytest.mark.parametrize("drawn", [torch.zeros(3, dtype=torch.int64), torch.zeros(4)])
def test_noise_of_another_shape_or_dtype_is_rejected(drawn):
    class Source(SecureNoise):
        def rounded_gaussian(self, *_arguments):
            return drawn

    with pytest.raises(ValueError, match="the noise source returned"):
        BoundedSum(torch.zeros(4, dtype=torch.int64), ONE).add_noise(1.0, Source())


def test_noise_statistics():
    """Mean, standard deviation and independence of secure noise."""
    steps = torch.arange(200_000)
    noise = BoundedSum(steps, ONE).add_noise(3.0, SecureNoise()) - steps * (ONE.norm / RESOLUTION)
    assert float(noise.mean()) == pytest.approx(0.0, abs=5 * 1.5 / 200_000**0.5)
    assert float(noise.std()) == pytest.approx(1.5, rel=0.01)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 * 1.5**2 / 200_000**0.5
    assert float((noise.abs() > 2 * 1.5).double().mean()) == pytest.approx(0.0455, abs=0.003)


def test_each_release_has_fresh_noise():
    value = torch.zeros(4, dtype=torch.int64)
    assert not torch.equal(
        BoundedSum(value, ONE).add_noise(1.0, SecureNoise()),
        BoundedSum(value, ONE).add_noise(1.0, SecureNoise()),
    )
    source = SimulatedNoise(seed=0, client="server", round=1, purpose="updates")
    assert not torch.equal(BoundedSum(value, ONE).add_noise(1.0, source), BoundedSum(value, ONE).add_noise(1.0, source))
