"""raFLoRA: each direction is averaged over the devices that trained it (Wu et al., 2026, arXiv:2602.13486).

Implemented from the paper's abstract. With weights that ignore ranks, a direction that few devices train is averaged
over all devices. It shrinks by the same factor in every round and vanishes (rank collapse).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, SiteUpdates, Updates, aggregation, in_every_round
from strategies.aggregation.flexlora import NOT_LINEAR, truncated_sum


@aggregation("raflora")
class RaFLoRA:
    """Σ_j Σ {p_k b_kj a_kj : r_k ≥ j} / Σ {p_k : r_k ≥ j} over directions j, truncated to `rank` as in FlexLoRA.

    Directions between two consecutive device ranks form one partition, and have the same weight. A direction that no
    device trained stays unchanged.
    """

    mixed_ranks = True
    stable_factors = False
    trains = staticmethod(in_every_round("both"))
    sensitivity = NOT_LINEAR

    def __init__(self, *, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Compute the best adapter of `rank` for these directions; diagnostics as in `flexlora.truncated_sum`."""
        return truncated_sum(current, updates, direction_terms, rank=self._rank, seed=derive_seed(self._seed, round))


def direction_terms(before: Factors, updates: SiteUpdates) -> Sequence[tuple[Tensor, Tensor]]:
    """Make the terms of the sum: the factors of each device, weighted by column, and the untrained directions."""
    totals = torch.zeros(len(before.a))  # Σ {p_k : r_k ≥ j}
    for factors, p in updates:
        totals[: len(factors.a)] += p
    terms = [(factors.a, factors.b * (p / totals[: len(factors.a)])) for factors, p in updates]
    untrained = totals == 0
    return [*terms, (before.a[untrained], before.b[:, untrained])]
