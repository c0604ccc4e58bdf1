"""Where DP noise and Poisson batches come from.

The server has no say in either: whoever knows the seed of the noise can subtract it.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


class NoiseSource(Protocol):
    """Draws for one job, step by step, in order."""

    @property
    def release(self) -> bool:
        """Whether what is made with this source may count as a private release."""
        ...

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        """Indices of the members of range(size) that join this step, each independently with probability `rate`."""
        ...

    def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
        """Standard normal noise, float32 [size], on `device`."""
        ...


class Simulated:
    """Reproducible noise, keyed by client, round and purpose: for simulations, never a release."""

    release = False

    def __init__(self, *, seed: int, client: str, round: int, purpose: str) -> None:
        self._seed = stream(seed, client, round, purpose, "privacy")
        self._batches = torch.Generator().manual_seed(stream(seed, client, round, purpose, "batches"))
        self._noises: dict[torch.device, torch.Generator] = {}

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return (torch.rand(size, generator=self._batches, dtype=torch.float64) < rate).nonzero().flatten()

    def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
        """Each kind of device has a stream of its own: a GPU draws what a CPU would take longer for than the step."""
        if device not in self._noises:
            self._noises[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.randn(size, generator=self._noises[device], device=device)


class Secure:
    """Noise from the operating system's CSPRNG: it has no seed, so nobody can choose or repeat it.

    The guarantee is that of the real-valued mechanism. Floating-point Gaussians miss some values, and which
    ones they can reach depends on the sum they hide (Mironov, 2012, "On significance of the least significant
    bits for differential privacy"); drawing in float64 and rounding to float32 hides the coarsest of those
    gaps, but it is no proof. A discrete Gaussian (Canonne et al., 2020, arXiv:2004.00010) would be one.
    """

    release = True

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return torch.from_numpy(np.flatnonzero(_uniforms(size) < rate))

    def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
        """Box and Muller (1958): √(−2 ln u) (cos 2πv, sin 2πv) are two independent normals."""
        u, v = _uniforms(size + size % 2).reshape(2, -1)
        radius, angle = np.sqrt(-2.0 * np.log1p(-u)), 2.0 * math.pi * v  # 1 − u lies in (0, 1]: its logarithm is finite
        normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(normals[:size].astype(np.float32)).to(device)


def source(round: int, purpose: str, *, client: str, seed: int | None) -> NoiseSource:
    """The noise of one client, round and purpose: the operating system's, or reproducible where a test names a seed."""
    return Secure() if seed is None else Simulated(seed=seed, client=client, round=round, purpose=purpose)


def _uniforms(size: int) -> np.ndarray:
    """Float64 [size], uniform on the 2⁵³ multiples of 2⁻⁵³ in [0, 1)."""
    bits = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
    return (bits >> np.uint64(11)) * 2.0**-53


def stream(*key: object) -> int:
    """A 63-bit seed for the random stream named by `key`: the same on every machine."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
