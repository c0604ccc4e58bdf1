"""FLoRA: the factors of all devices side by side are their exact mean (Wang et al., 2024, arXiv:2409.05976).

The paper adds the stacked product to the base after each round, and devices start again from fresh factors. A base in
few bits can't be written into without rounding, and every device holds the same one by its hash: here the stack stays
an adapter of its own beside the base, frozen, behind the fresh directions. The sum is the same.
"""

from __future__ import annotations

import torch

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, Linearity, Updates, always, check, shares
from strategies.aggregation.factored import compress, pad, stacked_mean


class FLoRA:
    """`rank` fresh directions, random A and zero B, and behind them everything that was learned so far.

    What travels grows by the ranks of all devices in every round, up to the sides of the matrices: an exact reference,
    not a way to run a federation.
    """

    mixed_ranks = True
    stable_factors = False
    trains = staticmethod(always("both"))
    sensitivity = Linearity(
        linear=False,
        reason="updates are stacked and not averaged: each can be read in the result",
        turned="every round begins with fresh ones",
    )

    def __init__(self, *, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Fresh directions before the stack; `rank` is that of both together."""
        check(updates)
        learned = {}
        for site, before in current.items():
            there = shares(updates, site)
            learned[site] = _without_loss(*stacked_mean(before, there)) if there else _without_loss(*before)
        size = self._rank + max(len(factors.a) for factors in learned.values())
        found: dict[str, Factors] = {}
        for site, (a, b) in learned.items():
            fresh = pad(Factors(a[:0], b[:, :0]), self._rank, derive_seed(self._seed, round, site, "fresh directions"))
            whole = Factors(torch.cat([fresh.a, a]), torch.cat([fresh.b, b], dim=1))
            found[site] = pad(whole, size, derive_seed(self._seed, round, site, "dead directions"))
        return Aggregated(found, {"rank": float(size)})


def _without_loss(a: torch.Tensor, b: torch.Tensor) -> Factors:
    """The same product without directions that are zero; with no more than the matrix has."""
    live = b.any(dim=0)
    a, b = a[live], b[:, live]
    return Factors(*compress(a, b, None)[:2]) if len(a) > min(a.shape[1], len(b)) else Factors(a, b)
