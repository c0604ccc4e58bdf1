"""Fed-SB: the mean of small cores between fixed factors (Singhal et al., 2025, arXiv:2502.15436).

ΔW = L C A with C `[r, r]`, so Σ p_k L C_k A = L (Σ p_k C_k) A is exact, r² numbers per site are sent, and privacy needs
correspondingly less noise. The paper derives L and A from the first gradient on the devices' own data. Here they are a
public frame (`adapter.lora_xs_bases`), which costs no ε.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, aggregation, in_every_round
from strategies.aggregation.one_factor import factor_mean


@aggregation("fedsb")
class FedSB:
    """Σ p_k C_k, computed as Σ p_k B_k with B_k = L C_k; equal ranks only."""

    mixed_ranks = False
    stable_factors = True
    sensitivity = Linearity(linear=True, reason="a mean of cores between factors that are not trained")
    trains = staticmethod(in_every_round("cores"))

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        return Aggregated(factor_mean("b", current, updates), {"rank": float(rank(current))})
