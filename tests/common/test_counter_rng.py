"""Counter-based random numbers: SplitMix64 bit for bit, uniform and normal, uncorrelated for neighboring keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from common import counter_rng

KEYS = st.integers(-(2**63), 2**63 - 1)
MASK = 2**64 - 1


def splitmix64(key: int, number: int) -> int:
    """Output `number` of the generator of Steele, Lea & Flood, in Python integers."""
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsigned(values: object) -> list[int]:
    return [int(value) & MASK for value in np.asarray(values).reshape(-1)]


def test_published_values() -> None:
    """Outputs of the reference implementation for seed 0."""
    answers = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(0, number) for number in range(3)] == answers
    assert unsigned(counter_rng.child(0, np.arange(3))) == answers
    assert unsigned(counter_rng._hashes(torch.zeros(1, dtype=torch.long), 3)) == answers


@given(keys=st.lists(KEYS, max_size=4), number=st.integers(0, 2**62))
@example(keys=[-1, 2**63 - 1, -(2**63)], number=0)
def test_child_is_splitmix64(keys: list[int], number: int) -> None:
    expected = [splitmix64(key, number) for key in keys]
    assert unsigned(counter_rng.child(np.array(keys, np.int64), number)) == expected
    assert counter_rng.child(np.array(keys, np.int64), number).dtype == np.int64
    for key, hashed in zip(keys, expected, strict=True):
        assert unsigned(counter_rng.child(key, number)) == [hashed]
        assert unsigned(counter_rng.child(key, np.array([number]))) == [hashed]


@given(keys=st.lists(KEYS, max_size=4), count=st.integers(0, 9))
def test_uniforms_and_normals_use_the_stream(keys: list[int], count: int) -> None:
    """u is made of the first 53 bits; Box-Muller pairs of the upper and lower 32 bits of each number."""
    given_keys = np.array(keys, np.int64)
    assert counter_rng.uniform(given_keys).tolist() == [(splitmix64(key, 0) >> 11) / 2**53 for key in keys]
    result = counter_rng.normals(torch.from_numpy(given_keys), count)
    assert result.dtype == torch.float32
    assert result.shape == (len(keys), count)
    for row, key in zip(result.double(), keys, strict=True):
        pairs = [splitmix64(key, number) for number in range(-(-count // 2))]
        radii = [math.sqrt(-2 * math.log(((pair >> 32) + 0.5) / 2**32)) for pair in pairs]
        angles = [2 * math.pi * (pair & 0xFFFFFFFF) / 2**32 for pair in pairs]
        pairs_of_normals = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
        expected = [normal for pair in pairs_of_normals for normal in pair][:count]
        assert row.tolist() == pytest.approx(expected, rel=1e-4, abs=5e-4)


@given(keys=st.lists(KEYS, max_size=3), count=st.integers(0, 9), fewer=st.integers(0, 9))
def test_shorter_streams_are_prefixes(keys: list[int], count: int, fewer: int) -> None:
    tensor = torch.tensor(keys, dtype=torch.long)
    fewer = min(fewer, count)
    assert torch.equal(counter_rng.normals(tensor, fewer), counter_rng.normals(tensor, count)[:, :fewer])


@pytest.mark.integration
@given(keys=st.lists(KEYS, min_size=1, max_size=5), data=st.data())
def test_streams_are_independent_of_the_batch(keys: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(keys) - 1))
    alone = counter_rng.normals(torch.tensor(keys[index : index + 1]), 7)
    torch.testing.assert_close(
        counter_rng.normals(torch.tensor(keys), 7)[index : index + 1], alone, rtol=1e-6, atol=1e-6
    )


def test_normals_are_standard_and_uncorrelated() -> None:
    """Also for neighboring keys: the streams of two entries, of two steps, and of children of two names."""
    drawn = counter_rng.normals(torch.arange(1000), 200)
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-6
    error = 1 / math.sqrt(drawn.numel())
    assert float(drawn.mean()) == pytest.approx(0, abs=5 * error)
    assert float(drawn.square().mean()) == pytest.approx(1, abs=5 * error * math.sqrt(2))
    assert float(drawn.pow(4).mean()) == pytest.approx(3, abs=5 * error * math.sqrt(96))
    neighbours = [(drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:]), (drawn[:, :100], drawn[:, 100:])]
    neighbours += [(one.square(), other.square()) for one, other in neighbours]
    for one, other in neighbours:
        result = np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(result) < 5.5 / math.sqrt(one.numel())
    per_stream = drawn.mean(1) * math.sqrt(200)
    assert stats.kstest(per_stream.numpy(), "norm").pvalue > 1e-6


def test_uniforms_and_children_are_uncorrelated() -> None:
    keys = counter_rng.child(7, np.arange(50_000))
    drawn = counter_rng.uniform(keys)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert stats.kstest(drawn, "uniform").pvalue > 1e-6
    grandchildren = counter_rng.uniform(counter_rng.child(keys, 1))
    for one, other in [
        (drawn[1:], drawn[:-1]),
        (drawn, grandchildren),
        (counter_rng.uniform(np.arange(50_000)), drawn),
    ]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5.5 / math.sqrt(len(one))
    assert len(np.unique(keys)) == len(keys)


def test_extreme_numbers_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper and lower halves of all zeros, of all ones, and where float32 would round up to 2³²."""
    halves = [0, 1, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    bits = [upper << 32 | lower for upper in halves for lower in halves]
    signed = torch.tensor([value - 2**64 if value >= 2**63 else value for value in bits])
    monkeypatch.setattr(counter_rng, "_hashes", lambda keys, count: signed.expand(len(keys), -1)[:, :count])
    drawn = counter_rng.normals(torch.zeros(2, dtype=torch.long), 2 * len(bits))
    assert drawn.isfinite().all()
    assert float(drawn.abs().max()) == pytest.approx(math.sqrt(-2 * math.log(0.5 / 2**32)), rel=1e-6)


def test_empty_streams() -> None:
    assert counter_rng.normals(torch.empty(0, dtype=torch.long), 5).shape == (0, 5)
    assert counter_rng.normals(torch.arange(3), 0).shape == (3, 0)
    assert counter_rng.uniform(np.empty(0, np.int64)).shape == (0,)
    assert counter_rng.child(np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)
