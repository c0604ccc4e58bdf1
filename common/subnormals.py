"""Subnormal numbers, which some processors flush to zero and others compute with, slowly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink


def without_subnormals(values: Tensor) -> Tensor:
    """Return a copy of floating-point numbers in which subnormal ones are zero."""
    limits = torch.finfo(values.dtype)
    return hardshrink(values, limits.tiny * (1 - limits.eps))  # the largest subnormal number, exact in the dtype
