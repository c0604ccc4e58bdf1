"""Adapters of another rank, against the singular value decomposition of their products."""

from __future__ import annotations

import pytest
import torch

from models.lora.adapter import Site, init_adapter, rank
from models.lora.resize import with_rank
from tests.helpers.adapters import random_adapter

SITES = {"wide": Site(20, 12), "small": Site(3, 8)}


@pytest.mark.parametrize("target", [1, 2, 4, 5, 9])
def test_best_approximation(target: int) -> None:
    adapter, fresh = random_adapter(SITES, 4), init_adapter(SITES, target, 0)
    result = with_rank(adapter, target, fresh)
    for name, (a, b) in adapter.items():
        assert result[name].a.shape == (target, SITES[name].inputs)
        assert result[name].b.shape == (SITES[name].outputs, target)
        u, values, vh = torch.linalg.svd(b @ a, full_matrices=False)
        best = u[:, :target] * values[:target] @ vh[:target]
        torch.testing.assert_close(result[name].b @ result[name].a, best, rtol=1e-4, atol=1e-5)
    assert rank(result) == target


def test_further_directions_can_be_trained() -> None:
    result = with_rank(random_adapter(SITES, 1), 3, init_adapter(SITES, 3, 0))
    for factors in result.values():
        assert not factors.b[:, 1:].any()
        assert factors.a[1:].any(1).all()
