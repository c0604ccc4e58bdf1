"""FFA-LoRA: A stays at its random initialization, the mean of B is shared (Sun et al., 2024, arXiv:2403.12313).

With one common A, the mean of the products is the product of the means, and noise enters a product once, as ξ_B A
without B ξ_A and ξ_B ξ_A. The learned update lies in the span of the random A.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, aggregation, in_every_round
from strategies.aggregation.one_factor import factor_mean


@aggregation("ffa")
class FFA:
    """Σ p_k B_k, with the common A.

    Devices in the paper have one rank. Here a device may train only the first directions of A; the columns of B that it
    did not train count with their current values, so that the mean is still the mean of the products.
    """

    mixed_ranks = True
    stable_factors = True
    sensitivity = Linearity(linear=True, reason="a mean of B beside an A that is not trained")
    trains = staticmethod(in_every_round("b"))

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        return Aggregated(factor_mean("b", current, updates), {"rank": float(rank(current))})
