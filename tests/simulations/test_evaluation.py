"""Adapters of guidance in the evaluation's arms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.lora.adapter import Adapter, Site, concatenate
from simulations.evaluation import guides_by_arm
from tests.helpers.adapters import random_adapter

SITES = {"x": Site(3, 4)}


def product(adapter: Adapter) -> Tensor:
    return adapter["x"].b @ adapter["x"].a


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_guides_keep_a_part_of_the_own_training(strength: float) -> None:
    """The local adapter fades towards the base, the personal one towards the shared adapter."""
    shared, own, local = (random_adapter(SITES, 2, seed=seed) for seed in range(3))
    arms = {"local": {"ann": local}, "shared": {"ann": shared}, "personal": {"ann": concatenate([shared, own])}}
    guides = guides_by_arm(arms, strength)
    assert guides.keys() == {"local", "personal"}
    torch.testing.assert_close(product(guides["local"]["ann"]), strength * product(local))
    torch.testing.assert_close(product(guides["personal"]["ann"]), product(shared) + strength * product(own))


def test_no_guide_differs_at_full_strength() -> None:
    assert guides_by_arm({"local": {"ann": random_adapter(SITES, 2, seed=0)}}, 1.0) == {}
