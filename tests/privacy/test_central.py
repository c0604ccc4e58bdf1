"""Clipping and noise of device updates, compared with loops, closed forms, and exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AntherError
from privacy.accounting import DEVICE
from privacy.bounded_sum import MAX_NOISE_MULTIPLIER, RESOLUTION
from privacy.central import MAX_CLIP, MIN_CLIP, AdaptiveClip, GaussianMechanism, clip_and_sum
from privacy.noise import SecureNoise, SimulatedNoise

SIZE = 5
ANYTHING = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 1.0]),
    st.floats(-2.0, 2.0, width=32),
)
UPDATES = st.lists(st.lists(ANYTHING, min_size=SIZE, max_size=SIZE), max_size=6)
CLIPS = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([MIN_CLIP, 0.5, 1.0, MAX_CLIP]))


def tensors(updates):
    return [torch.tensor(update, dtype=torch.float32) for update in updates]


def simulated():
    return SimulatedNoise(seed=0, client="server", round=1, purpose="updates")


def exact_values(clipped):
    step = Fraction(clipped.total.sensitivity.norm) / RESOLUTION
    return [count * step for count in clipped.total.steps.tolist()]


def value(bounded):
    return bounded.steps.double() * bounded.step


@pytest.mark.integration
@settings(max_examples=300)  # a guarantee of privacy, in cheap arithmetic
@given(UPDATES, st.lists(ANYTHING, min_size=SIZE, max_size=SIZE), CLIPS, st.integers(0, 6))
def test_removing_device_changes_sum_by_clip_at_most(others, one, clip, place):
    """In rational arithmetic. The count changes by ½, or not at all if the update is not finite."""
    without = clip_and_sum(tensors(others), clip, SIZE)
    joined = [*others[:place], one, *others[place:]]
    having = clip_and_sum(tensors(joined), clip, SIZE)
    sums = zip(exact_values(having), exact_values(without), strict=True)
    assert sum((one - other) ** 2 for one, other in sums) <= Fraction(clip) ** 2
    assert having.total.sensitivity.norm == clip
    counted = float(value(having.below)) - float(value(without.below))
    assert abs(counted) == (0.0 if having.dropped > without.dropped else having.below.sensitivity.norm)
    assert (having.total.sensitivity.unit, having.below.sensitivity.unit) == (DEVICE, DEVICE)


@given(UPDATES, CLIPS)
def test_sum_matches_loop(updates, clip):
    expected, below, dropped = np.zeros(SIZE), 0.0, 0
    for update in np.array(updates, dtype=np.float64).reshape(-1, SIZE):
        length = np.linalg.norm(update)
        if not np.isfinite(length):
            dropped += 1
            continue
        expected += update * min(1.0, clip / length) if length else 0.0
        below += (1.0 if length <= clip else 0.0) - 0.5
    result = clip_and_sum(tensors(updates), clip, SIZE)
    assert value(result.total).numpy() == pytest.approx(expected, abs=clip * len(updates) * 1.1e-6)
    assert (float(value(result.below)), result.dropped) == (below, dropped)


@given(UPDATES, st.randoms(use_true_random=False))
def test_sum_is_independent_of_order(updates, random):
    shuffled = random.sample(updates, len(updates))
    one, two = (clip_and_sum(tensors(order), 1.0, SIZE).total.steps for order in (updates, shuffled))
    assert torch.equal(one, two)


def test_no_devices():
    result = clip_and_sum([], 1.0, SIZE)
    assert torch.equal(value(result.total), torch.zeros(SIZE, dtype=torch.float64))
    assert (float(value(result.below)), result.dropped) == (0.0, 0)


def test_all_devices_have_equal_weight():
    """A scaled update counts no more than the update at the clip; a duplicate counts as another device."""
    update = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0])
    one, ten, two = (value(clip_and_sum(sent, 1.0, SIZE).total) for sent in ([update], [10 * update], [update, update]))
    assert torch.allclose(one, ten, atol=2 / RESOLUTION)
    assert torch.equal(2 * one, two)
    assert float(one.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_invalid_clip_is_rejected(clip):
    with pytest.raises(ValueError, match="clip="):
        clip_and_sum([], clip, SIZE)


@given(st.floats(0.1, 5.0), st.floats(3.0, 1e3))
def test_sum_and_count_cost_the_whole_round(z, deviation):
    """Two Gaussian mechanisms on one sample are one: in units of their noise, squared sensitivities add up."""
    of_sum = AdaptiveClip(quantile=0.5, rate=0.2, noise_stddev=deviation).noise_multiplier(z)
    assert of_sum > z
    assert math.hypot(1 / of_sum, 0.5 / deviation) == pytest.approx(1 / z, rel=1e-9)


def test_too_few_devices_for_adaptive_clip():
    with pytest.raises(AntherError, match=r"must be under 1, a tenth of the devices expected .*quantile=null"):
        GaussianMechanism(
            noise_multiplier=1.0, expected=10, adaptive=AdaptiveClip(quantile=0.5, rate=0.2, noise_stddev=0.5)
        )


def test_adaptive_clip_matches_the_paper():
    """Algorithm 1 of arXiv:1905.03871 as a loop over NumPy arrays, round by round, with the same normal numbers."""
    m, z, quantile, rate, sigma_b = 40, 0.7, 0.3, 0.5, 2.0
    mechanism = GaussianMechanism(
        noise_multiplier=z, expected=m, adaptive=AdaptiveClip(quantile=quantile, rate=rate, noise_stddev=sigma_b)
    )
    generator = np.random.default_rng(0)
    clip = reference = 0.05
    shares = []
    for number in range(80):
        updates = generator.normal(size=(m, SIZE)) * generator.lognormal(size=(m, 1))
        drawn = SimulatedNoise(seed=1, client="server", round=number, purpose="updates")
        norms = np.linalg.norm(updates, axis=1)
        z_delta = (z**-2 - (2 * sigma_b) ** -2) ** -0.5
        normals = drawn.rounded_gaussian(SIZE, z_delta * RESOLUTION).numpy() / (z_delta * RESOLUTION)
        of_count = drawn.rounded_gaussian(1, 2 * sigma_b * RESOLUTION).item() / (2 * sigma_b * RESOLUTION)
        total = (updates * np.minimum(1.0, reference / norms)[:, None]).sum(0)
        mean = (total + z_delta * reference * normals) / m
        share = ((norms <= reference).sum() + sigma_b * of_count) / m  # all m take part, so the centering cancels
        reference *= math.exp(-rate * (share - quantile))

        clipped = clip_and_sum(torch.from_numpy(updates), clip, SIZE)
        source = SimulatedNoise(seed=1, client="server", round=number, purpose="updates")
        released = mechanism.release(clipped, source)
        assert released.mean.numpy() == pytest.approx(mean, rel=1e-6, abs=1e-6 * clip)
        assert released.noise_stddev == pytest.approx(z_delta * clipped.total.sensitivity.norm / m)
        clip = released.next_clip
        assert clip == pytest.approx(reference, rel=1e-6)
        shares.append(np.mean(norms <= clip))
    assert np.mean(shares[-30:]) == pytest.approx(quantile, abs=0.05)


@pytest.mark.parametrize("below", [-1e9, 0.0, 1.0, 1e9])
def test_adaptive_clip_stays_in_range(below):
    result = AdaptiveClip(quantile=0.5, rate=50.0, noise_stddev=1.0).next(1.0, below)
    assert MIN_CLIP <= result <= MAX_CLIP


def test_fixed_clip_is_unchanged():
    released = GaussianMechanism(noise_multiplier=1.0, expected=4).release(clip_and_sum([], 0.25, SIZE), simulated())
    assert released.next_clip == 0.25


@pytest.mark.parametrize("replies", [0, 1, 7])
def test_divisor_is_the_public_constant(replies):
    """For any number of replies the noise is the same, and each reply contributes at most C/m."""
    size, m, clip, z = 20_000, 4.0, 0.5, 2.0
    update = torch.ones(size)
    clipped = clip_and_sum([update] * replies, clip, size)
    released = GaussianMechanism(noise_multiplier=z, expected=m).release(clipped, SecureNoise())
    assert released.noise_stddev == z * clip / m
    noise = released.mean - value(clipped.total) / m
    assert float(noise.std()) == pytest.approx(z * clip / m, rel=0.03)
    assert float(value(clipped.total).norm()) / m == pytest.approx(replies * clip / m, rel=1e-3)


def test_invalid_divisor_is_rejected():
    with pytest.raises(ValueError, match="expected=0"):
        GaussianMechanism(noise_multiplier=1.0, expected=0)


def test_excessive_noise_is_rejected_at_construction():
    with pytest.raises(AntherError, match="allow a larger epsilon"):
        GaussianMechanism(noise_multiplier=1.01 * MAX_NOISE_MULTIPLIER, expected=4)
