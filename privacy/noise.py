"""Sources of DP noise and of Poisson batches.

The server must not determine either: with the seed of the noise it could subtract the noise.

Noise is a whole number of steps of a public grid: the rounded Gaussian round(s·g) with g ~ N(0, 1). If the sum x is a
whole number of steps too, then x + round(s·g) = round(x + s·g). This is the Gaussian mechanism followed by rounding, so
its privacy loss holds by post-processing, and the set of possible releases is ℤ for every x. Floating point noise on a
floating point sum has neither property: the reachable values depend on the sum (Mironov, 2012, "On significance of the
least significant bits for differential privacy").
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
"""Largest standard deviation, in steps. Up to it, every sample is exact in float64."""

_BITS = 53  # random bits of a uniform that are drawn first
_CELL = 2.0**-_BITS  # width of the interval of numbers that begin with these bits
_MARGIN = 2.0**-45  # relative to the radius, see `_pairs`
_MAX_BITS = 4096
_BLOCK = 1 << 14  # pairs that are drawn at a time, so that their arrays stay in the cache


class NoiseSource(Protocol):
    """Random draws for one job, step by step, in order."""

    @property
    def release(self) -> bool:
        """Whether a result made with this source may count as a private release."""
        ...

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        """Return the members of range(size) that join this step, each independently with probability `rate`.

        Args:
            size: number of units.
            rate: sampling rate q in [0, 1].

        Returns:
            Indices of the members, int64 [members], ascending. May be empty.
        """
        ...

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        """Draw round(stddev · g) for independent standard normals g.

        Args:
            size: number of samples.
            stddev: standard deviation, over 0 and at most `MAX_STDDEV_STEPS`, in steps of the grid of the noised sum.
            device: device of the result.

        Returns:
            Samples, int64 [size].
        """
        ...


class SimulatedNoise:
    """Reproducible noise keyed by client, round and purpose. For simulations only, never a private release."""

    release = False

    def __init__(self, *, seed: int, client: str, round: int, purpose: str) -> None:
        self._seed = derive_seed(seed, client, round, purpose, "privacy")
        self._batches = torch.Generator().manual_seed(derive_seed(seed, client, round, purpose, "batches"))
        self._noises: dict[torch.device, torch.Generator] = {}

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        """See `NoiseSource.poisson_batch`."""
        return (torch.rand(size, generator=self._batches, dtype=torch.float64) < rate).nonzero().flatten()

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        """See `NoiseSource.rounded_gaussian`.

        Each device type has its own stream: drawing on the CPU would take longer than a step on the GPU.
        """
        check_stddev(stddev)
        if device not in self._noises:
            self._noises[device] = torch.Generator(device).manual_seed(self._seed)
        samples = torch.randn(size, generator=self._noises[device], device=device, dtype=torch.float64)
        return samples.mul_(stddev).round_().long()


class SecureNoise:
    """Noise from the operating system's CSPRNG. It has no seed, so that it can be neither chosen nor repeated.

    Both draws are exact: they have the distribution that `NoiseSource` states, not an approximation of it. Uniforms are
    real numbers whose first 53 bits are drawn at once; further bits are drawn if these don't decide the result. The
    only exception is a number that is undecided after 4,096 bits, which has a probability below 2⁻⁴⁰⁰⁰ and is covered
    by `accounting.SAMPLER_DELTA`. Exactness assumes that the operating system's bytes are uniform, and that NumPy's
    float64 log, sin and cos are accurate to 16 units in the last place (4 are documented).
    """

    release = True

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        """See `NoiseSource.poisson_batch`."""
        threshold = math.floor(rate / _CELL)
        first = _random_bits(size)
        joins = first < threshold
        for index in np.flatnonzero(first == threshold):  # the next bits decide
            joins[index] = _bernoulli(rate / _CELL - threshold)
        return torch.from_numpy(np.flatnonzero(joins))

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        """See `NoiseSource.rounded_gaussian`."""
        check_stddev(stddev)
        blocks = [_pairs(min(_BLOCK, remaining), stddev) for remaining in _remaining_counts(-(-size // 2))]
        samples = np.concatenate([np.empty(0, np.int64), *blocks])
        return torch.from_numpy(samples[:size]).to(device)


def check_stddev(stddev: float) -> None:
    """Raise ValueError for a standard deviation that no source supports."""
    if not 0 < stddev <= MAX_STDDEV_STEPS:
        raise ValueError(f"noise of {stddev:g} steps: must be over 0 and at most {MAX_STDDEV_STEPS:g}")


def noise_source(round: int, purpose: str, *, client: str, seed: int | None) -> NoiseSource:
    """Return the noise source of one client, round and purpose.

    Args:
        round: number of the round.
        purpose: purpose of the noise, which keys the stream.
        client: name of the client, or of the server.
        seed: None for `SecureNoise`; a number for reproducible `SimulatedNoise` in simulations and tests.
    """
    return SecureNoise() if seed is None else SimulatedNoise(seed=seed, client=client, round=round, purpose=purpose)


def _pairs(count: int, stddev: float) -> np.ndarray:
    """Draw pairs of rounded Gaussians s √(−2 ln u) (cos 2πv, sin 2πv) (Box and Muller, 1958), int64 [2 · count].

    u and v are known to lie in cells of width h = 2⁻⁵³. Within its cell the radius r varies by less than 2h / (u·r),
    since r(u)² − r(u+h)² = 2 ln(1 + h/u) ≤ 2h/u. The sine and cosine vary by 2πh, and the rounding errors of both, of r
    and of the products are below 2⁻⁴⁶ r in total. So if s·r·cos is further than s·(2h/(u·r) + 2⁻⁴⁵ r) from the midpoint
    of two integers, the nearest integer is the rounded Gaussian. Otherwise, once in 2⁴³/s numbers, further bits decide
    (`_resolve`).
    """
    first, second = _random_bits(2 * count).reshape(2, -1)
    u, angle = first * _CELL, second * (2.0 * math.pi * _CELL)
    with np.errstate(divide="ignore", invalid="ignore"):  # u = 0 gives an infinite radius and stays undecided
        radius = np.sqrt(-2.0 * np.log(u))
        margin = stddev * (2.0 * _CELL / (u * radius) + _MARGIN * radius)
        radius *= stddev
        values = np.stack([np.cos(angle), np.sin(angle)])
        values *= radius
        nearest = np.rint(values)
        values -= nearest  # exact
        decided = (np.abs(values, out=values) < 0.5 - margin).all(axis=0)
    undecided = np.flatnonzero(~decided)
    nearest[:, undecided] = 0.0
    samples = nearest.astype(np.int64)
    for index in undecided:
        samples[:, index] = _resolve(int(first[index]), int(second[index]), stddev)
    return samples.ravel()


def _resolve(first: int, second: int, stddev: float) -> tuple[int, int]:
    """Decide a pair that `_pairs` left open, by interval arithmetic with 64 more bits of u and v at a time."""
    from mpmath.ctx_iv import MPIntervalContext  # needed once in thousands of steps
    from mpmath.libmp import round_floor, to_int

    context = MPIntervalContext()  # the precision of mpmath's global context is shared by all threads
    for bits in range(_BITS + 64, _MAX_BITS, 64):
        first, second = ((bits_so_far << 64) | int.from_bytes(os.urandom(8)) for bits_so_far in (first, second))
        if first == 0:  # the radius has no bound yet
            continue
        context.prec = bits + 64
        u, v = (context.mpf([lower, lower + 1]) / (1 << bits) for lower in (first, second))
        radius, angle = context.sqrt(-2 * context.log(u)) * context.mpf(stddev), 2 * context.pi * v
        ends = [(radius * component + context.mpf(0.5))._mpi_ for component in (context.cos(angle), context.sin(angle))]
        (a, b), (c, d) = ([to_int(end, round_floor) for end in interval] for interval in ends)
        if a == b and c == d:
            return a, c
    raise ArithmeticError(f"{_MAX_BITS} random bits decided nothing: check the operating system's random generator")


def _bernoulli(probability: float) -> bool:
    """Draw an event of the given probability in [0, 1), exactly."""
    while probability:
        whole = math.floor(probability / _CELL)
        if (samples := int(_random_bits(1)[0])) != whole:
            return samples < whole
        probability = probability / _CELL - whole
    return False


def _random_bits(size: int) -> np.ndarray:
    """Draw integers uniformly from [0, 2⁵³), int64 [size]."""
    return (np.frombuffer(os.urandom(8 * size), dtype=np.uint64) >> np.uint64(64 - _BITS)).astype(np.int64)


def _remaining_counts(count: int) -> Iterator[int]:
    """Yield the remaining count before each block of `_BLOCK`."""
    return iter(range(count, 0, -_BLOCK))
