"""Noise: distribution, reproducibility where it is meant, and none where it would be a hole."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from scipy import stats

from privacy import noise
from privacy.noise import NoiseSource, Secure, Simulated, source, stream

SOURCES = [Simulated(seed=1, client="a", round=2, purpose="shared"), Secure()]


@pytest.mark.parametrize("source", SOURCES, ids=["simulated", "secure"])
def test_noise_is_standard_normal_and_white(source: NoiseSource) -> None:
    drawn = source.gaussian(200_001)  # odd: Box and Muller come in pairs
    assert drawn.dtype == torch.float32
    assert drawn.shape == (200_001,)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.012  # 5 standard errors
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_000:200_000])[0, 1]) < 0.016  # cosines against sines


@pytest.mark.parametrize("source", SOURCES, ids=["simulated", "secure"])
def test_poisson_batches_have_the_rate_and_differ(source: NoiseSource) -> None:
    sizes = [len(source.poisson_batch(50, 0.2)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(10, abs=5 * math.sqrt(8 / 2000))
    assert np.var(sizes) == pytest.approx(8, rel=0.2)  # n q (1 − q): a fixed size would have none
    batch = source.poisson_batch(1000, 0.5)
    assert batch.dtype == torch.int64
    assert len(batch.unique()) == len(batch)


@pytest.mark.parametrize("source", SOURCES, ids=["simulated", "secure"])
def test_extremes(source: NoiseSource) -> None:
    assert source.poisson_batch(7, 0.0).tolist() == []
    assert source.poisson_batch(7, 1.0).tolist() == list(range(7))
    assert source.poisson_batch(0, 0.5).tolist() == []
    assert source.gaussian(0).shape == (0,)


def test_the_smallest_and_largest_uniforms_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr(noise.os, "urandom", lambda count, byte=byte: byte * count)
        assert Secure().gaussian(4).isfinite().all()


def test_simulated_noise_is_keyed() -> None:
    def draw(**changed: object) -> list[float]:
        key = {"seed": 1, "client": "a", "round": 2, "purpose": "shared"} | changed
        return Simulated(**key).gaussian(8).tolist()  # type: ignore[arg-type]

    assert draw() == draw()
    others = [draw(seed=2), draw(client="b"), draw(round=3), draw(purpose="personal")]
    assert all(other != draw() for other in others)


def simulated(**changed: object) -> Simulated:
    return Simulated(**{"seed": 1, "client": "a", "round": 2, "purpose": "shared"} | changed)  # type: ignore[arg-type]


def test_simulated_batches_are_keyed() -> None:
    def draw(**changed: object) -> list[list[int]]:
        source = simulated(**changed)
        return [source.poisson_batch(50, 0.5).tolist() for _ in range(3)]

    assert draw() == draw()
    others = [draw(seed=2), draw(client="b"), draw(round=3), draw(purpose="personal")]
    assert all(other != draw() for other in others)


def test_noise_and_batches_of_a_simulation_come_from_streams_of_their_own() -> None:
    """What is trained doesn't depend on how much noise was drawn before, nor on which device."""
    apart, mixed = simulated(), simulated()
    batches = [apart.poisson_batch(50, 0.3).tolist() for _ in range(4)]
    noises = [apart.gaussian(5).tolist() for _ in range(4)]
    for batch, noise_before in zip(batches, noises, strict=True):
        assert mixed.gaussian(5).tolist() == noise_before
        assert mixed.poisson_batch(50, 0.3).tolist() == batch


def test_batches_are_independent_of_the_noise() -> None:
    """From one seed, who joins would tell the sign of the noise: both are made from the same uniforms."""
    joined, noises = torch.zeros(1000, 8), torch.zeros(1000, 8)
    for number in range(1000):
        source = simulated(round=number)
        joined[number, source.poisson_batch(8, 0.5)] = 1.0
        noises[number] = source.gaussian(8)
    correlations = np.corrcoef(joined.T, noises.T)[:8, 8:]
    assert np.abs(correlations).max() < 5 / 1000**0.5


def test_a_device_has_one_stream_that_goes_on() -> None:
    source, other = simulated(), simulated()
    first, second = source.gaussian(5), source.gaussian(5, torch.device("cpu"))
    assert not torch.equal(first, second)
    assert torch.equal(first, other.gaussian(5, torch.device("cpu")))
    assert torch.equal(second, other.gaussian(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("source", SOURCES, ids=["simulated", "secure"])
def test_noise_comes_on_its_device(source: NoiseSource) -> None:
    drawn = source.gaussian(10_001, torch.device("cuda"))
    assert drawn.device.type == "cuda"
    assert stats.kstest(drawn.cpu().numpy(), "norm").pvalue > 1e-6


def test_secure_noise_has_no_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = Secure().gaussian(8)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, Secure().gaussian(8))
    assert not inspect.signature(Secure).parameters
    assert Secure.release
    assert not Simulated.release


def test_streams_do_not_collide() -> None:
    assert stream(1, "a") == stream(1, "a")
    assert len({stream(1, "ab", "c"), stream(1, "a", "bc"), stream("1a", "bc"), stream(2, "ab", "c")}) == 4
    assert 0 <= stream("x") < 2**63


def test_a_source_is_the_operating_systems_unless_a_test_names_a_seed() -> None:
    assert isinstance(source(1, "train", client="a", seed=None), Secure)
    keys = [
        (1, "train", "a", 0),
        (2, "train", "a", 0),
        (1, "measure", "a", 0),
        (1, "train", "b", 0),
        (1, "train", "a", 1),
    ]
    drawn = [tuple(source(r, p, client=c, seed=s).gaussian(4).tolist()) for r, p, c, s in keys]
    assert len(set(drawn)) == len(keys)
    wanted = Simulated(seed=0, client="a", round=1, purpose="train").gaussian(4)
    assert drawn[0] == tuple(wanted.tolist())
