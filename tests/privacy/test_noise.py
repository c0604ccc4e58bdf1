"""Noise sources: distribution, reproducibility of simulated noise, and unpredictability of secure noise."""

from __future__ import annotations

import inspect
import math
import random
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from common.seeding import derive_seed
from privacy import noise
from privacy.noise import NoiseSource, SecureNoise, SimulatedNoise, noise_source

SOURCES = [SimulatedNoise(seed=1, client="a", round=2, purpose="shared"), SecureNoise()]
BOTH = pytest.mark.parametrize("source", SOURCES, ids=["simulated", "secure"])
STDDEV = 3.75 * 2**20
"""In steps, for σ = 3.75."""
COUNT = 200_001


def autocorrelation(drawn: np.ndarray) -> np.ndarray:
    """Compute the autocorrelation at every lag from 1, in standard errors of white noise, without wrapping around."""
    spectrum = np.fft.rfft(drawn, 2 * len(drawn))
    sums = np.fft.irfft(np.abs(spectrum) ** 2)[1 : len(drawn)]
    return sums / (drawn.var() * np.sqrt(np.arange(len(drawn) - 1, 0, -1)))


def probabilities(stddev: float, most: int) -> np.ndarray:
    """Probabilities of the rounded Gaussian from −most to most, with the tails added to both ends."""
    edges = np.arange(-most, most) + 0.5
    return np.diff(np.concatenate([[0.0], stats.norm.cdf(edges / stddev), [1.0]]))


@BOTH
def test_noise_is_a_rounded_gaussian(source: NoiseSource) -> None:
    drawn = source.rounded_gaussian(COUNT, STDDEV)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (COUNT,)
    normal = drawn.double().numpy() / STDDEV
    assert stats.kstest(normal, "norm").pvalue > 1e-6
    assert normal.std() == pytest.approx(1.0, abs=5 / (2 * COUNT) ** 0.5)
    assert abs(stats.kurtosis(normal)) < 5 * (24 / COUNT) ** 0.5
    assert 4.0 < np.abs(normal).max() < 7.0


@BOTH
@pytest.mark.parametrize("stddev", [0.3, 1.0, 4.5])
def test_integers_have_correct_probabilities(source: NoiseSource, stddev: float) -> None:
    most = max(1, round(3 * stddev))
    drawn = source.rounded_gaussian(COUNT, stddev).clamp(-most, most).numpy()
    result = np.bincount(drawn + most, minlength=2 * most + 1)
    assert stats.chisquare(result, COUNT * probabilities(stddev, most)).pvalue > 1e-6
    assert not source.rounded_gaussian(1000, 0.01).any()


@BOTH
def test_noise_has_no_autocorrelation(source: NoiseSource) -> None:
    """In particular, no part of the noise repeats another, which subtraction could cancel."""
    drawn = source.rounded_gaussian(COUNT, STDDEV).double().numpy() / STDDEV
    for moved in (drawn, np.abs(drawn) - np.abs(drawn).mean()):
        assert np.abs(autocorrelation(moved)).max() < 7.5  # of 200,000 lags
    half = (COUNT + 1) // 2
    assert abs(np.corrcoef(drawn[: half - 1], drawn[half:])[0, 1]) < 5 / half**0.5


@BOTH
def test_numbers_do_not_repeat(source: NoiseSource) -> None:
    """Noise of coarse resolution, e.g. float16 or float32, repeats numbers."""
    drawn = np.concatenate([source.rounded_gaussian(COUNT, 2.0**34).numpy() for _ in range(2)])
    assert len(np.unique(np.abs(drawn))) > 0.9999 * len(drawn)  # 8 equal pairs are expected


@BOTH
@pytest.mark.parametrize("stddev", [STDDEV, 2.0**30, 2.0**38])
def test_residues_are_uniform(source: NoiseSource, stddev: float) -> None:
    """The last bits of a release hide those of the sum. Coarser noise misses some residues."""
    count = COUNT if stddev < 2**35 else 20_001
    drawn = source.rounded_gaussian(count, stddev).numpy()
    for modulus in (2, 3, 256, 1000):
        assert stats.chisquare(np.bincount(drawn % modulus, minlength=modulus)).pvalue > 1e-6


@BOTH
@pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, math.inf, 2 * noise.MAX_STDDEV_STEPS])
def test_invalid_stddev_is_rejected(source: NoiseSource, stddev: float) -> None:
    with pytest.raises(ValueError, match="noise of"):
        source.rounded_gaussian(3, stddev)


@BOTH
def test_poisson_batches_have_the_rate(source: NoiseSource) -> None:
    sizes = [len(source.poisson_batch(50, 0.2)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(10, abs=5 * math.sqrt(8 / 2000))
    assert np.var(sizes) == pytest.approx(8, rel=0.2)  # n q (1 − q); batches of fixed size have no variance
    batch = source.poisson_batch(1000, 0.5)
    assert batch.dtype == torch.int64
    assert len(batch.unique()) == len(batch)


@BOTH
def test_extreme_rates_and_sizes(source: NoiseSource) -> None:
    assert source.poisson_batch(7, 0.0).tolist() == []
    assert source.poisson_batch(7, 1.0).tolist() == list(range(7))
    assert source.poisson_batch(0, 0.5).tolist() == []
    assert source.rounded_gaussian(0, STDDEV).shape == (0,)


class _FakeUrandom:
    """Replacement of os.urandom that returns fixed bytes first, then random ones, and counts the requested bytes."""

    def __init__(self, first: bytes, seed: int = 0) -> None:
        self._first, self._rest, self.asked = first, np.random.default_rng(seed), 0

    def __call__(self, count: int) -> bytes:
        self.asked += count
        given, self._first = self._first[:count], self._first[count:]
        return given + (self._rest.bytes(count - len(given)) if count > len(given) else b"")


def words(*numbers: int) -> bytes:
    """Encode 53-bit numbers as `SecureNoise` reads them."""
    return np.array([number << 11 for number in numbers], dtype=np.uint64).tobytes()


@pytest.mark.parametrize("first", [0, 1, 2, 2**52, 2**53 - 2, 2**53 - 1])
@pytest.mark.parametrize("second", [0, 1, 2**51, 2**52 - 1, 2**52, 2**53 - 1])
@pytest.mark.parametrize("stddev", [0.5, STDDEV, 2.0**41])
def test_extreme_uniforms_are_resolved(monkeypatch: pytest.MonkeyPatch, first: int, second: int, stddev: float) -> None:
    """Compares with mpmath (100 digits) on the further bits that are drawn where 53 don't decide."""
    urandom = _FakeUrandom(words(first, second), seed=first ^ second)
    monkeypatch.setattr(noise.os, "urandom", urandom)
    result = SecureNoise().rounded_gaussian(2, stddev)
    bits, replay = 53, _FakeUrandom(words(first, second), seed=first ^ second)
    u, v = (int.from_bytes(replay(8), "little") >> 11 for _ in range(2))
    while replay.asked < urandom.asked:
        u, v, bits = u << 64 | int.from_bytes(replay(8)), v << 64 | int.from_bytes(replay(8)), bits + 64
    with mpmath.workdps(100):
        for end in (mpmath.mpf("0.001"), mpmath.mpf("0.999")):  # anywhere in the cell of each uniform
            for other in (mpmath.mpf("0.001"), mpmath.mpf("0.999")):
                radius = stddev * mpmath.sqrt(-2 * mpmath.log((u + end) / mpmath.mpf(2) ** bits))
                angle = 2 * mpmath.pi * (v + other) / mpmath.mpf(2) ** bits
                exact = [int(mpmath.nint(radius * turned)) for turned in (mpmath.cos(angle), mpmath.sin(angle))]
                assert result.tolist() == exact


def test_further_bits_decide_open_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is exact, with or without further bits: compared with mpmath on the bits that decided."""
    urandom, count, stddev = _FakeUrandom(b"", seed=5), 400, 2.0**41
    monkeypatch.setattr(noise.os, "urandom", urandom)
    result = SecureNoise().rounded_gaussian(count, stddev).view(2, -1).T
    assert urandom.asked > 8 * count  # some needed further bits
    first, second = (np.frombuffer(_FakeUrandom(b"", seed=5)(8 * count), np.uint64) >> np.uint64(11)).reshape(2, -1)
    with mpmath.workdps(60):
        for pair, u, v in zip(result.tolist(), first.tolist(), second.tolist(), strict=True):
            radius = stddev * mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(u + 0.5, -53)))
            angle = 2 * mpmath.pi * mpmath.ldexp(v + 0.5, -53)
            margin = 1 + stddev * (
                2 / (u * radius / stddev) + radius / stddev * 2**-48
            )  # half a step, and the widths of the cells
            for number, exact in zip(pair, (radius * mpmath.cos(angle), radius * mpmath.sin(angle)), strict=True):
                assert abs(number - exact) <= margin


def test_broken_generator_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.os, "urandom", bytes)
    with pytest.raises(ArithmeticError, match="check the operating system's random generator"):
        SecureNoise().rounded_gaussian(2, 1.0)


def test_secure_noise_uses_only_system_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal system bytes give equal draws for any seeds of Python, NumPy and PyTorch; different bytes give different
    ones.
    """

    def draw(seed: int, system_seed: int) -> list[list[int]]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        urandom = _FakeUrandom(b"", seed=system_seed)
        monkeypatch.setattr(noise.os, "urandom", urandom)
        source = SecureNoise()
        draws = [source.rounded_gaussian(5, STDDEV).tolist(), source.poisson_batch(50, 0.3).tolist()]
        assert urandom.asked == 8 * (6 + 50)  # every number uses its own bits
        return draws

    assert draw(0, 0) == draw(1, 0)
    for one, other in zip(draw(0, 0), draw(0, 1), strict=True):
        assert one != other


@pytest.mark.parametrize("rate", [0.5, 0.3, 2.0**-53, 3 * 2.0**-54, 1e-300])
def test_bernoulli_draw_is_exact(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """Where 53 bits are not enough, the next ones decide: compared with the rate in rational arithmetic."""
    threshold = Fraction(rate) * 2**53
    whole = math.floor(threshold)
    rest = (threshold - whole) * 2**53
    for further in {0, math.floor(rest), math.ceil(rest), 2**53 - 1} - {2**53}:
        monkeypatch.setattr(noise.os, "urandom", _FakeUrandom(words(whole, further)))
        joined = bool(len(SecureNoise().poisson_batch(1, rate)))
        if further != rest and math.floor(rest) != further:
            assert joined == (further < rest)
    for drawn in {max(0, whole - 1), whole + 1} - {whole}:
        monkeypatch.setattr(noise.os, "urandom", _FakeUrandom(words(drawn)))
        assert bool(len(SecureNoise().poisson_batch(1, rate))) == (drawn < threshold)


@BOTH
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_batch_sizes_are_binomial(source: NoiseSource, rate: float) -> None:
    sizes = np.bincount([len(source.poisson_batch(50, rate)) for _ in range(4000)], minlength=51)
    expected = 4000 * stats.binom.pmf(np.arange(51), 50, rate)
    assert sizes[0] == pytest.approx(expected[0], abs=5 * expected[0] ** 0.5)
    common = expected > 5
    rest = [sizes[~common].sum(), expected[~common].sum()]
    assert stats.chisquare([*sizes[common], rest[0]], [*expected[common], rest[1]]).pvalue > 1e-6


def test_simulated_noise_is_keyed() -> None:
    def draw(**changed: object) -> list[int]:
        key = {"seed": 1, "client": "a", "round": 2, "purpose": "shared"} | changed
        return SimulatedNoise(**key).rounded_gaussian(8, STDDEV).tolist()  # type: ignore[arg-type]

    assert draw() == draw()
    others = [draw(seed=2), draw(client="b"), draw(round=3), draw(purpose="personal")]
    assert all(other != draw() for other in others)


def simulated(**changed: object) -> SimulatedNoise:
    return SimulatedNoise(**{"seed": 1, "client": "a", "round": 2, "purpose": "shared"} | changed)  # type: ignore[arg-type]


def test_simulated_batches_are_keyed() -> None:
    def draw(**changed: object) -> list[list[int]]:
        source = simulated(**changed)
        return [source.poisson_batch(50, 0.5).tolist() for _ in range(3)]

    assert draw() == draw()
    others = [draw(seed=2), draw(client="b"), draw(round=3), draw(purpose="personal")]
    assert all(other != draw() for other in others)


def test_simulated_noise_and_batches_have_separate_streams() -> None:
    """Batches depend neither on the amount of noise drawn before nor on the device."""
    apart, mixed = simulated(), simulated()
    batches = [apart.poisson_batch(50, 0.3).tolist() for _ in range(4)]
    noises = [apart.rounded_gaussian(5, STDDEV).tolist() for _ in range(4)]
    for batch, noise_before in zip(batches, noises, strict=True):
        assert mixed.rounded_gaussian(5, STDDEV).tolist() == noise_before
        assert mixed.poisson_batch(50, 0.3).tolist() == batch


def test_batches_are_independent_of_noise() -> None:
    """With one seed for both, batch membership would reveal the sign of the noise: both use the same uniforms."""
    joined, noises = torch.zeros(1000, 8), torch.zeros(1000, 8)
    for number in range(1000):
        source = simulated(round=number)
        joined[number, source.poisson_batch(8, 0.5)] = 1.0
        noises[number] = source.rounded_gaussian(8, STDDEV) / STDDEV
    correlations = np.corrcoef(joined.T, noises.T)[:8, 8:]
    assert np.abs(correlations).max() < 5 / 1000**0.5


def test_stream_continues_between_calls() -> None:
    source, other = simulated(), simulated()
    first, second = source.rounded_gaussian(5, STDDEV), source.rounded_gaussian(5, STDDEV, torch.device("cpu"))
    assert not torch.equal(first, second)
    assert torch.equal(first, other.rounded_gaussian(5, STDDEV, torch.device("cpu")))
    assert torch.equal(second, other.rounded_gaussian(5, STDDEV))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_noise_is_on_requested_device(source: NoiseSource) -> None:
    drawn = source.rounded_gaussian(10_001, STDDEV, torch.device("cuda"))
    assert drawn.device.type == "cuda"
    assert stats.kstest(drawn.cpu().numpy() / STDDEV, "norm").pvalue > 1e-6


def test_secure_noise_has_no_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = SecureNoise().rounded_gaussian(8, STDDEV)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, SecureNoise().rounded_gaussian(8, STDDEV))
    assert not inspect.signature(SecureNoise).parameters
    assert SecureNoise.release
    assert not SimulatedNoise.release


def test_derived_seeds_do_not_collide() -> None:
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert (
        len({derive_seed(1, "ab", "c"), derive_seed(1, "a", "bc"), derive_seed("1a", "bc"), derive_seed(2, "ab", "c")})
        == 4
    )
    assert 0 <= derive_seed("x") < 2**63


def test_source_is_secure_without_a_seed() -> None:
    assert isinstance(noise_source(1, "train", client="a", seed=None), SecureNoise)
    keys = [
        (1, "train", "a", 0),
        (2, "train", "a", 0),
        (1, "measure", "a", 0),
        (1, "train", "b", 0),
        (1, "train", "a", 1),
    ]
    drawn = [tuple(noise_source(r, p, client=c, seed=s).rounded_gaussian(4, STDDEV).tolist()) for r, p, c, s in keys]
    assert len(set(drawn)) == len(keys)
    expected = SimulatedNoise(seed=0, client="a", round=1, purpose="train").rounded_gaussian(4, STDDEV)
    assert drawn[0] == tuple(expected.tolist())
