"""Where DP noise and Poisson batches come from.

The server has no say in either: with the seed of the noise it could subtract it.

Noise is a whole number of steps of a public grid, the rounded Gaussian round(s·g) with g ~ N(0, 1). For a sum x that is
whole steps too, x + round(s·g) = round(x + s·g): the Gaussian mechanism, rounded afterwards, so that its privacy loss
holds by post-processing, and the set of possible releases is ℤ whatever x is. Floating point noise on a floating point
sum has neither property: which numbers it can reach depends on the sum (Mironov, 2012, "On significance of the least
significant bits for differential privacy").
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.seeding import derive_seed

CPU = torch.device("cpu")

MAX_STDDEV_STEPS = 2.0**41
"""The largest standard deviation in steps: with it every number that is drawn is exact in float64."""

_BITS = 53  # of a uniform, at first
_CELL = 2.0**-_BITS  # width of what those bits leave open
_MARGIN = 2.0**-45  # relative to the radius: see `_pairs`
_MOST_BITS = 4096
_BLOCK = 1 << 14  # pairs that are drawn at once: their arrays stay in the cache


class NoiseSource(Protocol):
    """Draws for one job, step by step, in order."""

    @property
    def release(self) -> bool:
        """Whether what is made with this source may count as a private release."""
        ...

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        """Indices of the members of range(size) that join this step, each independently with probability `rate`."""
        ...

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        """round(stddev · g) for independent standard normals g, int64 [size], on `device`.

        Args:
            stddev: over 0, at most `MAX_STDDEV_STEPS`; in steps of the grid that the noised sum lies on.
        """
        ...


class SimulatedNoise:
    """Reproducible noise, keyed by client, round and purpose: for simulations, never a release."""

    release = False

    def __init__(self, *, seed: int, client: str, round: int, purpose: str) -> None:
        self._seed = derive_seed(seed, client, round, purpose, "privacy")
        self._batches = torch.Generator().manual_seed(derive_seed(seed, client, round, purpose, "batches"))
        self._noises: dict[torch.device, torch.Generator] = {}

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return (torch.rand(size, generator=self._batches, dtype=torch.float64) < rate).nonzero().flatten()

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        """Each kind of device has a stream of its own: a GPU draws what a CPU would take longer for than the step."""
        check_stddev(stddev)
        if device not in self._noises:
            self._noises[device] = torch.Generator(device).manual_seed(self._seed)
        drawn = torch.randn(size, generator=self._noises[device], device=device, dtype=torch.float64)
        return drawn.mul_(stddev).round_().long()


class SecureNoise:
    """Noise from the operating system's CSPRNG: it has no seed, so nobody can choose or repeat it.

    Both draws are exact: they have the distribution that `NoiseSource` states, not one near it. Uniforms are real
    numbers of which the first 53 bits are drawn at once, and more wherever those don't decide the result. What is left
    is that a number stays undecided after 4,096 bits, with a probability under 2⁻⁴⁰⁰⁰ (`accounting.SAMPLING` covers
    it), and two assumptions: the operating system's bytes are uniform, and NumPy's float64 log, sin and cos are right
    to 16 units in the last place (4 are documented).
    """

    release = True

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        whole = math.floor(rate / _CELL)
        first = _bits(size)
        joins = first < whole
        for index in np.flatnonzero(first == whole):  # the next bits decide
            joins[index] = _happens(rate / _CELL - whole)
        return torch.from_numpy(np.flatnonzero(joins))

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        check_stddev(stddev)
        blocks = [_pairs(min(_BLOCK, left), stddev) for left in _counting_down(-(-size // 2))]
        drawn = np.concatenate([np.empty(0, np.int64), *blocks])
        return torch.from_numpy(drawn[:size]).to(device)


def check_stddev(stddev: float) -> None:
    """Raises ValueError for noise that no source draws."""
    if not 0 < stddev <= MAX_STDDEV_STEPS:
        raise ValueError(f"noise of {stddev:g} steps: must be over 0, and {MAX_STDDEV_STEPS:g} at most")


def noise_source(round: int, purpose: str, *, client: str, seed: int | None) -> NoiseSource:
    """The noise of one client, round and purpose: the operating system's, or reproducible where a test names a seed."""
    return SecureNoise() if seed is None else SimulatedNoise(seed=seed, client=client, round=round, purpose=purpose)


def _pairs(count: int, stddev: float) -> np.ndarray:
    """`count` pairs of rounded Gaussians, int64 [2 · count], by Box and Muller (1958): s √(−2 ln u) (cos 2πv, sin 2πv).

    u and v are known to lie in cells of width h = 2⁻⁵³. Within its cell the radius r varies by less than 2h / (u·r),
    since r(u)² − r(u+h)² = 2 ln(1 + h/u) ≤ 2h/u. The sine and cosine vary by 2πh, and what is computed of them, r and
    the products is off by less than 2⁻⁴⁶ r in all. So where s·r·cos is further than s·(2h/(u·r) + 2⁻⁴⁵ r) from the
    middle between two integers, the nearest one is the rounded Gaussian. Elsewhere, once in 2⁴³/s numbers, further
    bits decide (`_resolved`).
    """
    first, second = _bits(2 * count).reshape(2, -1)
    u, angle = first * _CELL, second * (2.0 * math.pi * _CELL)
    with np.errstate(divide="ignore", invalid="ignore"):  # u = 0 gives an infinite radius, and decides nothing
        radius = np.sqrt(-2.0 * np.log(u))
        margin = stddev * (2.0 * _CELL / (u * radius) + _MARGIN * radius)
        radius *= stddev
        values = np.stack([np.cos(angle), np.sin(angle)])
        values *= radius
        nearest = np.rint(values)
        values -= nearest  # exactly
        decided = (np.abs(values, out=values) < 0.5 - margin).all(axis=0)
    undecided = np.flatnonzero(~decided)
    nearest[:, undecided] = 0.0
    drawn = nearest.astype(np.int64)
    for index in undecided:
        drawn[:, index] = _resolved(int(first[index]), int(second[index]), stddev)
    return drawn.ravel()


def _resolved(first: int, second: int, stddev: float) -> tuple[int, int]:
    """The pair that `_pairs` left open, by interval arithmetic on 64 bits more of u and v until both are decided."""
    from mpmath.ctx_iv import MPIntervalContext  # needed once in thousands of steps
    from mpmath.libmp import round_floor, to_int

    context = MPIntervalContext()  # of its own: the precision of mpmath's is shared by all threads
    for bits in range(_BITS + 64, _MOST_BITS, 64):
        first, second = ((known << 64) | int.from_bytes(os.urandom(8)) for known in (first, second))
        if first == 0:  # the radius has no bound yet
            continue
        context.prec = bits + 64
        u, v = (context.mpf([known, known + 1]) / (1 << bits) for known in (first, second))
        radius, angle = context.sqrt(-2 * context.log(u)) * context.mpf(stddev), 2 * context.pi * v
        ends = [(radius * turned + context.mpf(0.5))._mpi_ for turned in (context.cos(angle), context.sin(angle))]
        (a, b), (c, d) = ([to_int(end, round_floor) for end in interval] for interval in ends)
        if a == b and c == d:
            return a, c
    raise ArithmeticError(f"{_MOST_BITS} random bits decided nothing: is the operating system's generator broken?")


def _happens(probability: float) -> bool:
    """Whether an event of this probability in [0, 1) happens, exactly."""
    while probability:
        whole = math.floor(probability / _CELL)
        if (drawn := int(_bits(1)[0])) != whole:
            return drawn < whole
        probability = probability / _CELL - whole
    return False


def _bits(size: int) -> np.ndarray:
    """Int64 [size], uniform on [0, 2⁵³)."""
    return (np.frombuffer(os.urandom(8 * size), dtype=np.uint64) >> np.uint64(64 - _BITS)).astype(np.int64)


def _counting_down(count: int) -> Iterator[int]:
    """`count`, and what is left of it block after block."""
    return iter(range(count, 0, -_BLOCK))
