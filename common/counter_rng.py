"""Counter-based random numbers: a key gives the same numbers on every device and in any batch.

SplitMix64 (Steele, Lea & Flood, 2014, doi:10.1145/2660193.2660195, figure 14): the k-th number of a key's stream is a
hash of key + (k+1)·γ, so that numbers of many streams are drawn at once. Use it for timesteps and diffusion noise only:
anyone who knows a key can compute the numbers, so DP noise comes from `privacy.noise`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_ONE, _TWO = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def child(keys: np.ndarray | int, number: np.ndarray | int) -> np.ndarray:
    """Derive the keys of separate streams, int64: child `number` of each key."""
    step = np.asarray(number, np.int64).view(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        z = np.asarray(keys, np.int64).view(np.uint64) + step * np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_ONE)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_TWO)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


def uniform(keys: np.ndarray | int) -> np.ndarray:
    """Return the first number of each stream, float64 in [0, 1), with the shape of `keys`."""
    return (child(keys, 0).view(np.uint64) >> np.uint64(11)) * 2.0**-53


def normals(keys: Tensor, count: int) -> Tensor:
    """Return the first `count` standard normals of each stream [n], float32 [n, count] (Box and Muller, 1958)."""
    bits = _hashes(keys, -(-count // 2))
    u = (_logical_shift(bits, 32).float() + 0.5) * 2.0**-32  # in (0, 1]: its logarithm is finite
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    radius = u.log().mul_(-2).sqrt_()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :count]


def _hashes(keys: Tensor, count: int) -> Tensor:
    """Return the first `count` numbers of each stream, int64 [n, count], all bits random. Arithmetic wraps around."""
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(_GAMMA)
    z = keys[:, None] + steps
    z = (z ^ _logical_shift(z, 30)) * _signed(_ONE)
    z = (z ^ _logical_shift(z, 27)) * _signed(_TWO)
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; the shift of int64 repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z
