"""Fed-SB: the mean of small cores between factors that stay (Singhal et al., 2025, arXiv:2502.15436).

ΔW = L C A with C [r, r], so that Σ p_k L C_k A = L (Σ p_k C_k) A is exact, r² numbers a site travel, and under privacy
that much less noise. The paper takes L and A from the first gradient on the devices' own data; here they are a frame
that is public (`adapter.lora_xs_bases`), which costs no ε.
"""

from __future__ import annotations

from models.lora.adapter import Adapter, rank
from strategies.aggregation import Aggregated, Linearity, Updates, always
from strategies.aggregation.one_factor import factor_mean


class FedSB:
    """Σ p_k C_k, as Σ p_k B_k of B_k = L C_k: equal ranks only."""

    mixed_ranks = False
    stable_factors = True
    sensitivity = Linearity(linear=True, reason="a mean of cores between factors that nobody trains")
    trains = staticmethod(always("cores"))

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:  # noqa: ARG002
        return Aggregated(factor_mean("b", current, updates), {"rank": float(rank(current))})
