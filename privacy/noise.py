"""Where DP noise and Poisson batches come from.

The server has no say in either: whoever knows the seed of the noise can subtract it.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Draws for one job, step by step, in order."""

    release: bool
    """Whether what is made with this source may count as a private release."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        """Indices of the members of range(size) that join this step, each with probability `rate`."""
        ...

    def gaussian(self, size: int) -> Tensor:
        """Standard normal noise, float32 [size]."""
        ...


class _Generated:
    """Draws from a torch generator."""

    release: bool

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return (torch.rand(size, generator=self._generator, dtype=torch.float64) < rate).nonzero().flatten()

    def gaussian(self, size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)


class Simulated(_Generated):
    """Reproducible noise, keyed by client, round and purpose: for simulations, never a release."""

    release = False

    def __init__(self, *, seed: int, client: str, round: int, purpose: str) -> None:
        super().__init__(stream(seed, client, round, purpose, "privacy"))


def stream(*key: object) -> int:
    """A 63-bit seed for the random stream named by `key`: the same on every machine."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
