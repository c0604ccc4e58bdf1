"""FedSVD: the mean of B, and an A that is made anew every round (Lee et al., 2025, arXiv:2505.12805).

Devices train B alone, so that the mean is exact and noise enters a product once. Then B̄ A = U Σ Vᵀ, the next A is Vᵀ
and the next B is U Σ: A follows what was learned without being trained, and with its rows orthonormal ‖ξ_B A‖ = ‖ξ_B‖
and ‖∂/∂B‖ ≤ ‖∂/∂W‖, so that a clip and its noise mean the same at every site.
"""

from __future__ import annotations

import torch

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, rank
from strategies.aggregation import Aggregated, Linearity, Updates, always
from strategies.aggregation.factored import pad
from strategies.aggregation.one_factor import factor_mean


class FedSVD:
    """Σ p_k B_k, then both factors turned so that A has orthonormal rows, in falling order of singular values.

    Ranks may differ, as with FFA-LoRA: a device of smaller rank then trains the strongest directions.
    """

    mixed_ranks = True
    stable_factors = False  # directions turn
    sensitivity = Linearity(
        linear=True,
        reason="a mean of B, beside an A that nobody trains in this round; the mean alone says how both then turn",
        turned="both are turned in each, as its mean says",
    )
    trains = staticmethod(always("b"))

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """The same product at each site, which nobody trained too: as the paper's server, for all of them."""
        turned = {site: orthonormalize(factors) for site, factors in factor_mean("b", current, updates).items()}
        size = rank(current)
        found = {
            site: pad(f, size, derive_seed(self._seed, round, site, "dead directions")) for site, f in turned.items()
        }
        return Aggregated(found, {"rank": float(size)})


def orthonormalize(factors: Factors) -> Factors:
    """The same product with A [r, in] of orthonormal rows and B = U Σ, in float64; of r directions, in at most.

    By the factors: with Aᵀ = Q_a R_a and B R_aᵀ = Q_b R_b the decomposition is that of the small R_b. A has all r rows
    also where singular values are 0: they span what A spanned, so that those directions can still learn.
    """
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    q_b, r_b = torch.linalg.qr(factors.b.double() @ r_a.T)
    u, sigma, vh = torch.linalg.svd(r_b, full_matrices=True)
    b = torch.zeros(len(factors.b), len(vh), dtype=torch.float64)
    b[:, : len(sigma)] = q_b @ (u * sigma)
    return Factors(vh @ q_a.T, b)
