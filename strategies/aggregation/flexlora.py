"""FlexLoRA: the mean of whole products, given back to each device at its own rank (Bai et al., 2024, arXiv:2402.11505).

Devices train the first r_k directions of the singular value decomposition of the mean. There the mean is formed as a
matrix; here by its factors, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, Linearity, SiteUpdates, Updates, always, check, shares
from strategies.aggregation.factored import ProductSum, mean_residual, pad

NOT_LINEAR = Linearity(
    linear=False,
    reason="a product of two factors isn't linear in them, and the singular vectors that are kept follow from the "
    "updates: no clip of one bounds what it does to them",
    turned="the singular vectors of each round's mean are others than the last round's",
)


class FlexLoRA:
    """Σ p_k B_k A_k truncated to `rank`, with A's rows orthonormal and all scale in B.

    In the paper a device holds nothing beyond its own rank, so that nothing of it enters the mean: directions that few
    train fade. Here they stay frozen beside what it trains, and fade all the same.
    """

    mixed_ranks = True
    stable_factors = False
    trains = staticmethod(always("both"))
    sensitivity = NOT_LINEAR

    def __init__(self, *, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """The best adapter of `rank` for the mean; diagnostics as those of `truncated_sum`."""

        def whole(before: Factors, there: SiteUpdates) -> Sequence[tuple[Tensor, Tensor]]:  # noqa: ARG001
            return [(factors.a, p * factors.b) for factors, p in there]

        return truncated_sum(current, updates, whole, rank=self._rank, seed=derive_seed(self._seed, round))


def truncated_sum(
    current: Adapter,
    updates: Updates,
    terms: Callable[[Factors, SiteUpdates], Sequence[tuple[Tensor, Tensor]]],
    *,
    rank: int,
    seed: int,
) -> Aggregated:
    """At each site the best factors of `rank` of the sum of these terms.

    Diagnostics, means over the sites that were trained: `energy`, what truncation keeps of the sum, and `residual`, the
    relative distance of the result from the true mean of what devices made of the adapter.

    Args:
        terms: factors A [r, in] and B [out, r] of each, from the site's current factors and its shares.
        seed: of random vectors, and of A in directions that the sum has not.
    """
    check(updates)
    found, energies, residuals = dict(current), [], []
    for site, before in current.items():
        if not (there := shares(updates, site)):
            continue
        total = ProductSum(inputs=before.a.shape[1], outputs=len(before.b), max_rank=rank, seed=derive_seed(seed, site))
        for a, b in terms(before, there):
            total.add(a, b)
        best = total.best(max_rank=rank)
        found[site] = pad(Factors(best.a, best.b), rank, derive_seed(seed, site, "dead directions"))
        energies.append(best.energy)
        residuals.append(mean_residual(found[site], before, there))
    trained = max(1, len(residuals))
    energy = sum(energies) / trained if energies else 1.0
    return Aggregated(found, {"rank": float(rank), "energy": energy, "residual": sum(residuals) / trained})
