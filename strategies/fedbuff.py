"""FedBuff: devices train all the time, and K updates make a round (Nguyen et al., 2022, arXiv:2106.06639, algorithm 1).

An update may have begun at an older adapter than the one it is now to change: what it made of that older one is scaled
by 1/√(1 + τ), τ rounds later, and put on top of the current one. Which form that takes is the aggregation's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from models.lora.adapter import Adapter, Factors

PLANS_PER_ROUND = 10_000
"""Plans of one round at most: each has a number of its own, for a device answers for a number only once."""

BUFFER_SIZE, CONCURRENCY = 10, 10
"""Updates of a round, and devices that are at work at any time, where nobody says."""

Rebase = Callable[[Adapter, Adapter, Adapter, float], Adapter]
"""From (current, started, trained, scale) to what the device would have trained of the current one."""


def plan_number(round: int, place: int) -> int:
    """The number of the plan that is sent in this place of a round: no other plan of the run has it."""
    if not 0 <= place < PLANS_PER_ROUND:
        raise ValueError(f"{place=}: a round has {PLANS_PER_ROUND} plans at most")
    return round * PLANS_PER_ROUND + place


def staleness_weight(rounds: int) -> float:
    """What an update counts that began so many rounds ago, 1/√(1 + τ)."""
    return 1.0 / math.sqrt(1.0 + rounds)


def rebase_factors(current: Adapter, started: Adapter, trained: Adapter, scale: float) -> Adapter:
    """Factor by factor, A_g + s (A_k − A_v) and B_g + s (B_k − B_v): for rules that are linear in factors."""
    return {
        site: Factors(
            current[site].a[: len(a)] + scale * (a - started[site].a[: len(a)]),
            current[site].b[:, : len(a)] + scale * (b - started[site].b[:, : len(a)]),
        )
        for site, (a, b) in trained.items()
    }


def rebase_product(current: Adapter, started: Adapter, trained: Adapter, scale: float) -> Adapter:
    """The product B_g A_g + s (B_k A_k − B_v A_v) as stacked factors: for rules that go by products of any rank."""
    found = {}
    for site, (a, b) in trained.items():
        (a_g, b_g), (a_v, b_v) = current[site], started[site]
        before = scale * b_v[:, : len(a)]
        found[site] = Factors(torch.cat([a_g, a, a_v[: len(a)]]), torch.cat([b_g, scale * b, -before], dim=1))
    return found


REBASES: dict[str, Rebase] = {"exact": rebase_product, "fedit": rebase_factors}
"""By aggregation; another one can't take an update of an older adapter."""
