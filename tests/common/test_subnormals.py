"""Subnormal numbers become zero, and no other number changes."""

from __future__ import annotations

import pytest
import torch

from common.subnormals import without_subnormals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_only_subnormal_numbers_become_zero(dtype: torch.dtype) -> None:
    """On both sides of the smallest normal number, and at the ends of the range."""
    limits = torch.finfo(dtype)
    zero, tiny = torch.tensor([0.0, limits.tiny], dtype=dtype)
    below, above = torch.nextafter(tiny, zero), torch.nextafter(tiny, torch.tensor(1.0, dtype=dtype))
    smallest = torch.nextafter(zero, tiny)
    values = torch.stack([zero, smallest, below, tiny, above, torch.tensor(limits.max, dtype=dtype)])
    values = torch.cat([values, -values])
    expected = torch.where(values.abs().double() < limits.tiny, torch.zeros_like(values), values)
    assert torch.equal(without_subnormals(values), expected)
    assert values[1] != 0  # a copy
