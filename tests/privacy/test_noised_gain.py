"""Noised gains: one unit changes the sum by at most the clip, and the noise is the charged one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from privacy.accounting import PoissonGaussian, epsilon
from privacy.noise import CPU, NoiseSource, SecureNoise
from privacy.noised_gain import STEPS_PER_CLIP, clipped_sum, noise_error, noised_mean

GAINS = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(-0.3, 0.3), max_size=12)
CLIPS = st.floats(1e-6, 100.0)


class _ConstantNoise:
    """Noise source that always returns the same number."""

    release = False

    def __init__(self, drawn: float) -> None:
        self._drawn = drawn

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        raise AssertionError(f"nobody samples {size} at {rate}")

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return torch.full((size,), round(self._drawn * stddev), device=device)


def mean(gains: list[float], noise: NoiseSource, *, clip: float = 0.1, sigma: float = 3.0, count: int = 5) -> float:
    return noised_mean(gains, clip=clip, noise_multiplier=sigma, count=count, noise=noise)


@given(GAINS, CLIPS, st.data())
def test_removing_gain_changes_sum_within_sensitivity(gains: list[float], clip: float, data: st.DataObject) -> None:
    whole = clipped_sum(gains, clip)
    assert whole.sensitivity.norm == clip
    assert STEPS_PER_CLIP * whole.step == pytest.approx(clip)
    for index in range(len(gains)):
        rest = clipped_sum([*gains[:index], *gains[index + 1 :]], clip)
        assert abs(whole.steps - rest.steps) <= STEPS_PER_CLIP
    more = clipped_sum([data.draw(st.floats()), *gains], clip)
    assert abs(more.steps - whole.steps) <= STEPS_PER_CLIP


@given(GAINS, CLIPS)
def test_sum_of_clipped_gains(gains: list[float], clip: float) -> None:
    expected = np.clip([gain for gain in gains if not math.isnan(gain)], -clip, clip).sum()
    result = clipped_sum(gains, clip)
    assert abs(result.steps * result.step - expected) <= (len(gains) / 2 + 1e-6) * result.step
    assert clipped_sum(gains[::-1], clip).steps == result.steps


@pytest.mark.parametrize("gain", [math.inf, 1e308, -math.inf, -1e308])
def test_sensitivity_is_attained(gain: float) -> None:
    assert abs(clipped_sum([gain], 0.1).steps) == STEPS_PER_CLIP


def test_noise_follows_from_sensitivity_and_public_divisor() -> None:
    gains = [0.05, -0.02, 0.5, math.nan]
    exact = (0.05 - 0.02 + 0.1) / 5
    assert mean(gains, _ConstantNoise(0.0)) == pytest.approx(exact, abs=1e-4)
    assert mean(gains, _ConstantNoise(1.0)) - mean(gains, _ConstantNoise(0.0)) == pytest.approx(3.0 * 0.1 / 5, rel=1e-6)
    assert mean(gains, _ConstantNoise(-1.0), clip=0.2, sigma=1.0) == pytest.approx(
        (0.05 - 0.02 + 0.2 - 0.2) / 5, abs=1e-4
    )
    assert mean([], _ConstantNoise(2.0)) == pytest.approx(2 * 3.0 * 0.1 / 5)


@given(GAINS, st.floats(-4, 4, width=32))
def test_release_is_a_multiple_of_the_step(gains: list[float], drawn: float) -> None:
    """A sum of floats would reveal itself in its last digits, which noise of 24 bits doesn't cover."""
    steps = mean(gains, _ConstantNoise(drawn)) * 5 * STEPS_PER_CLIP / 0.1
    assert steps == pytest.approx(round(steps), abs=1e-6)


def test_noise_has_the_charged_stddev() -> None:
    noise = SecureNoise()
    result = np.array([mean([0.05, 0.3], noise) for _ in range(4000)])
    assert result.mean() == pytest.approx(0.15 / 5, abs=5 * 0.06 / 4000**0.5)
    assert result.std() == pytest.approx(3.0 * 0.1 / 5, rel=0.06)
    assert result.std() == pytest.approx(noise_error(clip=0.1, noise_multiplier=3.0, count=5), rel=0.06)
    assert result[:2000].mean() != result[2000:].mean()  # each call draws new noise


def test_standard_error_of_several_means() -> None:
    drawn = np.random.default_rng(0).normal(0, noise_error(clip=0.2, noise_multiplier=4.0, count=5), (20_000, 10))
    expected = drawn.mean(1).std()
    assert noise_error(clip=0.2, noise_multiplier=4.0, count=5, means=10) == pytest.approx(expected, rel=0.02)


def test_cost_is_that_of_the_gaussian_mechanism() -> None:
    """Compares theorem 8 of Balle and Wang (2018, arXiv:1805.06530) with the accountant."""

    def phi(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    sigma, delta = 3.0, 1e-3
    result = epsilon([PoissonGaussian(noise_multiplier=sigma, sampling_rate=1.0, steps=1)], delta).value
    exact = phi(1 / (2 * sigma) - result * sigma) - math.exp(result) * phi(-1 / (2 * sigma) - result * sigma)
    assert exact == pytest.approx(delta, rel=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"clip": math.nan},
        {"clip": math.inf},
        {"sigma": 0.0},
        {"sigma": math.nan},
        {"sigma": math.inf},
        {"count": 0},
    ],
)
def test_invalid_parameters_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        mean([0.1], _ConstantNoise(0.0), **wrong)  # type: ignore[arg-type]
