"""FedSVD: the mean of B, and a new A in every round (Lee et al., 2025, arXiv:2505.12805).

Devices train only B, so the mean is exact and noise enters a product once. Then B̄ A = U Σ Vᵀ, the next A is Vᵀ and the
next B is U Σ: A follows the trained B without being trained itself. Its rows are orthonormal, so ‖ξ_B A‖ = ‖ξ_B‖ and
‖∂/∂B‖ ≤ ‖∂/∂W‖, and a clip and its noise have the same effect at every site.
"""

from __future__ import annotations

import torch

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, rank
from strategies.aggregation import Aggregated, Linearity, Updates, aggregation, in_every_round
from strategies.aggregation.factored import pad
from strategies.aggregation.one_factor import factor_mean


@aggregation("fedsvd")
class FedSVD:
    """Σ p_k B_k, then a rotation of both factors: A gets orthonormal rows, in descending order of singular values.

    Ranks may differ, as with FFA-LoRA: a device of smaller rank then trains the strongest directions.
    """

    mixed_ranks = True
    stable_factors = False  # directions rotate
    sensitivity = Linearity(
        linear=True,
        reason="a mean of B beside an A that is not trained in this round; the mean determines the rotation of both",
        rotation_reason="both factors are rotated in every round, as determined by its mean",
    )
    trains = staticmethod(in_every_round("b"))

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Average B and rotate the factors of every site, including sites that no device trained, as in the paper."""
        rotated = {site: orthonormalize(factors) for site, factors in factor_mean("b", current, updates).items()}
        size = rank(current)
        adapter = {
            site: pad(factors, size, derive_seed(self._seed, round, site, "dead directions"))
            for site, factors in rotated.items()
        }
        return Aggregated(adapter, {"rank": float(size)})


def orthonormalize(factors: Factors) -> Factors:
    """Return the same product with an A of orthonormal rows and B = U Σ, in float64.

    With Aᵀ = Q_a R_a and B R_aᵀ = Q_b R_b, the decomposition is that of the small R_b. A keeps all r rows, also where
    singular values are 0: they span the same space as before, so these directions can still be trained.

    Args:
        factors: A `[r, in]` and B `[out, r]`, r ≤ in.

    Returns:
        A `[r, in]` and B `[out, r]`.
    """
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    q_b, r_b = torch.linalg.qr(factors.b.double() @ r_a.T)
    u, sigma, vh = torch.linalg.svd(r_b, full_matrices=True)
    b = torch.zeros(len(factors.b), len(vh), dtype=torch.float64)
    b[:, : len(sigma)] = q_b @ (u * sigma)
    return Factors(vh @ q_a.T, b)
