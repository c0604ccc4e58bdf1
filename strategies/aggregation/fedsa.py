"""FedSA-LoRA: the mean of A is shared, and each device keeps its own B (Guo et al., 2025, arXiv:2410.01463).

A learns the features that devices have in common, B those specific to one device. Both are trained on the device,
under the same clip and noise if there are any; only A is uploaded. B at the server stays zero, so the shared adapter
has no product by itself: a device that has trained evaluates, generates and personalizes with its own B
(`client.rounds.local_factors`), any other device uses the base.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, aggregation, in_every_round
from strategies.aggregation.one_factor import factor_mean


@aggregation("fedsa")
class FedSA:
    """Σ p_k A_k. All devices train the same rank, which their local B has too."""

    mixed_ranks = False
    stable_factors = True
    sensitivity = Linearity(linear=True, reason="a mean of A; B never leaves its device")
    trains = staticmethod(in_every_round("split"))

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        return Aggregated(factor_mean("a", current, updates), {"rank": float(rank(current))})
