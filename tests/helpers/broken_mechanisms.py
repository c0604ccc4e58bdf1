"""Noise sources that each break what is promised in one way, around an honest one. None is ever a release."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from privacy.noise import CPU, NoiseSource


class Around:
    """An honest source, for the parts that are not broken."""

    release = False

    def __init__(self, inner: NoiseSource) -> None:
        self.inner = inner

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self.inner.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.inner.rounded_gaussian(size, stddev, device)


class Scaled(Around):
    """Noise that is too small, or too large."""

    def __init__(self, inner: NoiseSource, scale: float) -> None:
        super().__init__(inner)
        self.scale = scale

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.inner.rounded_gaussian(size, self.scale * stddev, device)


class CopiedHalf(Around):
    """The second half of each vector of noise is its first half."""

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        half = self.inner.rounded_gaussian(-(-size // 2), stddev, device)
        return torch.cat([half, half])[:size]


class Periodic(Around):
    """Noise that repeats itself."""

    def __init__(self, inner: NoiseSource, period: int) -> None:
        super().__init__(inner)
        self.period = period

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        once = self.inner.rounded_gaussian(min(size, self.period), stddev, device)
        return once.repeat(-(-size // self.period))[:size]


class Remembered(Around):
    """The noise of the first step in all steps."""

    drawn: Tensor | None = None

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        if self.drawn is None or len(self.drawn) != size:
            self.drawn = self.inner.rounded_gaussian(size, stddev, device)
        return self.drawn


class InFloat16(Around):
    """Normals of 11 bits, scaled afterwards: a lattice that sums stand out from (Mironov, 2012)."""

    def __init__(self, inner: NoiseSource, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(inner)
        self.dtype = dtype

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        normals = self.inner.rounded_gaussian(size, stddev, device).double() / stddev
        return normals.to(self.dtype).double().mul(stddev).round().long()


class FixedSize(Around):
    """Batches of the expected size, accounted as Poisson batches."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        order = np.random.default_rng(int(self.inner.rounded_gaussian(1, 1e9).abs())).permutation(size)
        return torch.from_numpy(np.sort(order[: round(rate * size)]))


class Everybody(Around):
    """Every picture in every batch."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)


class NeverEmpty(Around):
    """A batch that would be empty is drawn again."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        while not len(batch := self.inner.poisson_batch(size, rate)):
            pass
        return batch


class SeededBatches(Around):
    """Batches from a generator that begins anew with each job: the same in each round."""

    def __init__(self, inner: NoiseSource) -> None:
        super().__init__(inner)
        self.generator = torch.Generator().manual_seed(0)

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return (torch.rand(size, generator=self.generator) < rate).nonzero().flatten()
