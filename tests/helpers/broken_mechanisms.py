"""Noise sources that wrap an honest one and each violate the guarantee in one way. None produces a release."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from privacy.noise import CPU, NoiseSource


class NoiseWrapper:
    """Passes everything on to an honest source."""

    release = False

    def __init__(self, inner: NoiseSource) -> None:
        self.inner = inner

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self.inner.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.inner.rounded_gaussian(size, stddev, device)


class ScaledNoise(NoiseWrapper):
    """Noise with a wrong standard deviation."""

    def __init__(self, inner: NoiseSource, scale: float) -> None:
        super().__init__(inner)
        self.scale = scale

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.inner.rounded_gaussian(size, self.scale * stddev, device)


class CopiedNoise(NoiseWrapper):
    """Noise whose second half is a copy of its first half."""

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        half = self.inner.rounded_gaussian(-(-size // 2), stddev, device)
        return torch.cat([half, half])[:size]


class PeriodicNoise(NoiseWrapper):
    """Noise that repeats with a period."""

    def __init__(self, inner: NoiseSource, period: int) -> None:
        super().__init__(inner)
        self.period = period

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        once = self.inner.rounded_gaussian(min(size, self.period), stddev, device)
        return once.repeat(-(-size // self.period))[:size]


class ReusedNoise(NoiseWrapper):
    """Noise of the first step in all steps."""

    drawn: Tensor | None = None

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        if self.drawn is None or len(self.drawn) != size:
            self.drawn = self.inner.rounded_gaussian(size, stddev, device)
        return self.drawn


class LowPrecisionNoise(NoiseWrapper):
    """Normals of 11 bits that are scaled afterwards: sums are visible on their lattice (Mironov, 2012)."""

    def __init__(self, inner: NoiseSource, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(inner)
        self.dtype = dtype

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        normals = self.inner.rounded_gaussian(size, stddev, device).double() / stddev
        return normals.to(self.dtype).double().mul(stddev).round().long()


class FixedSizeBatches(NoiseWrapper):
    """Batches of the expected size that are accounted as Poisson batches."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        order = np.random.default_rng(int(self.inner.rounded_gaussian(1, 1e9).abs())).permutation(size)
        return torch.from_numpy(np.sort(order[: round(rate * size)]))


class FullBatches(NoiseWrapper):
    """Batches of all pictures."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)


class NonEmptyBatches(NoiseWrapper):
    """Poisson batches that are drawn again if empty."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        while not len(batch := self.inner.poisson_batch(size, rate)):
            pass
        return batch


class SeededBatches(NoiseWrapper):
    """Batches from a generator that is seeded anew for each job, so that each round has the same."""

    def __init__(self, inner: NoiseSource) -> None:
        super().__init__(inner)
        self.generator = torch.Generator().manual_seed(0)

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return (torch.rand(size, generator=self.generator) < rate).nonzero().flatten()
