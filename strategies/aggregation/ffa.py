"""FFA-LoRA: A stays at its random start, the mean of B is shared (Sun et al., 2024, arXiv:2403.12313).

With one A for everybody the mean of the products is the product of the means, and noise enters a product once, as
ξ_B A and not also as B ξ_A and ξ_B ξ_A. What is learned lies in the span of the random A.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, always
from strategies.aggregation.one_factor import factor_mean


class FFA:
    """Σ p_k B_k, with the common A.

    The paper's devices have one rank. Here a device may train the first directions of A alone: the columns of B that it
    left stay for it as they were, so that the mean is still that of the products.
    """

    mixed_ranks = True
    stable_factors = True
    sensitivity = Linearity(linear=True, reason="a mean of B, beside an A that nobody trains")
    trains = staticmethod(always("b"))

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        return Aggregated(factor_mean("b", current, updates), {"rank": float(rank(current))})
