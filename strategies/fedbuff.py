"""FedBuff: devices train continuously, and K updates form a round (Nguyen et al., 2022, arXiv:2106.06639, algorithm 1).

An update may have started from an older adapter than the current one. Its change of that older adapter is then scaled
by 1/√(1 + τ), τ rounds later, and applied to the current adapter. The aggregation declares the form of the change as
`rebase`; aggregations without it can't use updates of an older adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from models.lora.adapter import Adapter, Factors

PLANS_PER_ROUND = 10_000
"""Largest number of plans in a round. Each plan has its own number, since a device answers each number only once."""

Rebase = Callable[[Adapter, Adapter, Adapter, float], Adapter]
"""Function of (current, started, trained, scale): the update as if it had started from the current adapter."""


def plan_number(round: int, index: int) -> int:
    """Return the number of the plan at this index of a round; it is unique in the run."""
    if not 0 <= index < PLANS_PER_ROUND:
        raise ValueError(f"{index=}: a round has at most {PLANS_PER_ROUND} plans")
    return round * PLANS_PER_ROUND + index


def staleness_weight(rounds: int) -> float:
    """Return the weight 1/√(1 + τ) of an update that started τ rounds ago."""
    return 1.0 / math.sqrt(1.0 + rounds)


def rebase_factors(current: Adapter, started: Adapter, trained: Adapter, scale: float) -> Adapter:
    """Rebase by factor, A_g + s (A_k − A_v) and B_g + s (B_k − B_v), for rules that are linear in factors.

    Args:
        current: (A_g, B_g).
        started: (A_v, B_v), adapter that the device started from.
        trained: (A_k, B_k), its update.
        scale: s.
    """
    return {
        site: Factors(
            current[site].a[: len(a)] + scale * (a - started[site].a[: len(a)]),
            current[site].b[:, : len(a)] + scale * (b - started[site].b[:, : len(a)]),
        )
        for site, (a, b) in trained.items()
    }


def rebase_product(current: Adapter, started: Adapter, trained: Adapter, scale: float) -> Adapter:
    """Rebase by product, B_g A_g + s (B_k A_k − B_v A_v) as stacked factors, for rules on products of any rank.

    Args:
        current: (A_g, B_g).
        started: (A_v, B_v), adapter that the device started from.
        trained: (A_k, B_k), its update.
        scale: s.
    """
    rebased = {}
    for site, (a, b) in trained.items():
        (a_g, b_g), (a_v, b_v) = current[site], started[site]
        before = scale * b_v[:, : len(a)]
        rebased[site] = Factors(torch.cat([a_g, a, a_v[: len(a)]]), torch.cat([b_g, scale * b, -before], dim=1))
    return rebased
