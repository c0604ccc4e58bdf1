"""RoLoRA: devices train B in one round and A in the next (Chen et al., 2025, arXiv:2502.01755).

In each round one factor is common to all devices, so the mean of the products is the product of the means, and over two
rounds both factors are trained. Half of an adapter is uploaded.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, aggregation
from strategies.aggregation.one_factor import factor_mean


@aggregation("rolora")
class RoLoRA:
    """Σ p_k B_k beside the common A in odd rounds, Σ p_k A_k beside the common B in even ones.

    B comes first because it starts at zero: A would have no gradient. Ranks may differ, as with FFA-LoRA.
    """

    mixed_ranks = True
    stable_factors = False  # a change of B has no meaning in a round that trains A
    sensitivity = Linearity(
        linear=True, reason="a mean of one factor beside the other, which is not trained in this round"
    )

    def trains(self, round: int, /) -> str:
        return "b" if round % 2 else "a"

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        return Aggregated(factor_mean(self.trains(round), current, updates), {"rank": float(rank(current))})
