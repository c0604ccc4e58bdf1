"""RoLoRA: B in one round, A in the next (Chen et al., 2025, arXiv:2502.01755).

In each round one factor is everybody's, so that the mean of the products is the product of the means, and over two
rounds both learn. Half of an adapter travels up.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates
from strategies.aggregation.one_factor import factor_mean


class RoLoRA:
    """Σ p_k B_k beside the common A in odd rounds, Σ p_k A_k beside the common B in even ones.

    B first, as it starts at zero: A would have no gradient. Ranks may differ, as with FFA-LoRA.
    """

    mixed_ranks = True
    stable_factors = False  # a change of B says nothing to a round that trains A
    sensitivity = Linearity(linear=True, reason="a mean of one factor, beside another that nobody trains in this round")

    def trains(self, round: int, /) -> str:
        return "b" if round % 2 else "a"

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        return Aggregated(factor_mean(self.trains(round), current, updates), {"rank": float(rank(current))})
