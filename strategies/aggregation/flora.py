"""FLoRA: the stacked factors of all devices are their exact mean (Wang et al., 2024, arXiv:2409.05976).

The paper adds the stacked product to the base after each round, and devices start again from fresh factors. A quantized
base can't be written to without rounding, and every device identifies its base by hash. Here the stack therefore stays
an adapter beside the base, frozen, after the fresh directions. The sum is the same.
"""

from __future__ import annotations

import torch

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import (
    Aggregated,
    Linearity,
    Updates,
    aggregation,
    check_updates,
    in_every_round,
    site_updates,
)
from strategies.aggregation.factored import compress, pad, stacked_mean


@aggregation("flora")
class FLoRA:
    """`rank` fresh directions with random A and zero B, followed by all directions learned so far.

    The payload grows by the ranks of all devices in every round, up to the sides of the matrices. The rule is an exact
    reference and not meant for a real federation.
    """

    mixed_ranks = True
    stable_factors = False
    own_rank = True
    trains = staticmethod(in_every_round("both"))
    sensitivity = Linearity(
        linear=False,
        reason="updates are stacked instead of averaged: each one can be read from the result",
        rotation_reason="every round begins with fresh ones",
    )

    def __init__(self, *, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Put fresh directions before the stack; the diagnostic `rank` is the rank of both together."""
        check_updates(updates)
        learned = {}
        for site, before in current.items():
            trained = site_updates(updates, site)
            learned[site] = _lossless(*stacked_mean(before, trained)) if trained else _lossless(*before)
        size = self._rank + max(len(factors.a) for factors in learned.values())
        adapter: dict[str, Factors] = {}
        for site, (a, b) in learned.items():
            fresh = pad(Factors(a[:0], b[:, :0]), self._rank, derive_seed(self._seed, round, site, "fresh directions"))
            stacked = Factors(torch.cat([fresh.a, a]), torch.cat([fresh.b, b], dim=1))
            adapter[site] = pad(stacked, size, derive_seed(self._seed, round, site, "dead directions"))
        return Aggregated(adapter, {"rank": float(size)})


def _lossless(a: torch.Tensor, b: torch.Tensor) -> Factors:
    """Drop directions with a zero B, and compress the rest if it exceeds the rank of the matrix; same product."""
    live = b.any(dim=0)
    a, b = a[live], b[:, live]
    return Factors(*compress(a, b, None)[:2]) if len(a) > min(a.shape[1], len(b)) else Factors(a, b)
