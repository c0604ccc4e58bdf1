"""raFLoRA: each direction is a mean over those who trained it (Wu et al., 2026, arXiv:2602.13486, after its abstract).

With weights that don't look at ranks, a direction that few devices train is divided among all, shrinks by the same
share every round and is lost: rank collapse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, SiteUpdates, Updates, always
from strategies.aggregation.flexlora import NOT_LINEAR, truncated_sum


class RaFLoRA:
    """Σ_j Σ {p_k b_kj a_kj : r_k ≥ j} / Σ {p_k : r_k ≥ j} over directions j, truncated to `rank` as in FlexLoRA.

    Directions between two ranks that occur are one partition, with one weight. One that nobody trained stays.
    """

    mixed_ranks = True
    stable_factors = False
    trains = staticmethod(always("both"))
    sensitivity = NOT_LINEAR

    def __init__(self, *, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """The best adapter of `rank` for these directions; diagnostics as those of `flexlora.truncated_sum`."""
        return truncated_sum(current, updates, by_direction, rank=self._rank, seed=derive_seed(self._seed, round))


def by_direction(before: Factors, there: SiteUpdates) -> Sequence[tuple[Tensor, Tensor]]:
    """The terms of the sum: each device's factors, weighted column by column, and what nobody trained."""
    among = torch.zeros(len(before.a))  # Σ {p_k : r_k ≥ j}
    for factors, p in there:
        among[: len(factors.a)] += p
    terms = [(factors.a, factors.b * (p / among[: len(factors.a)])) for factors, p in there]
    left = among == 0
    return [*terms, (before.a[left], before.b[:, left])]
