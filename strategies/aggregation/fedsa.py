"""FedSA-LoRA: the mean of A is shared, every device keeps its own B (Guo et al., 2025, arXiv:2410.01463).

A is found to learn what is common, B what is a device's own. Both are trained on the device, under the same clip and
noise if there are any; A goes up. B at the server stays zero, so the shared adapter has no product by itself: whoever
trained measures, draws and personalises with their own B (`client.rounds.local_factors`), and anybody else has the base.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, always
from strategies.aggregation.one_factor import factor_mean


class FedSA:
    """Σ p_k A_k. Devices have one rank: their own B has it."""

    mixed_ranks = False
    stable_factors = True
    sensitivity = Linearity(linear=True, reason="a mean of A; B never leaves its device")
    trains = staticmethod(always("split"))

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        return Aggregated(factor_mean("a", current, updates), {"rank": float(rank(current))})
