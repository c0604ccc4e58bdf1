"""Adapters as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.lora.adapter import Adapter, Site, concatenate, guides_of
from tests.helpers.adapters import random_adapter


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_guides_weaken_the_personal_adapter_only(strength: float) -> None:
    """Their product is that of the shared adapter plus a part of the personal one."""
    sites = {"x": Site(3, 4)}
    shared, personal = (random_adapter(sites, rank, seed=rank) for rank in (1, 2))

    def product(adapters: Sequence[Adapter]) -> Tensor:
        a, b = concatenate(adapters)["x"]
        return b @ a

    expected = product([shared]) + strength * product([personal])
    torch.testing.assert_close(product(guides_of([shared, personal], strength)), expected)
    assert guides_of([shared], strength) == [shared]
    assert guides_of([], strength) == []
