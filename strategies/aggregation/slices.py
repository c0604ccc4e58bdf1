"""Mean of adapters by slices of their rank, so that directions of few devices are not diluted by all the others.

In the mean of products, a device counts with the current value of each direction beyond its rank. A direction that few
devices train then moves only by their weight, and if it counted as zero it would fade (rank collapse; Wu et al., 2026,
arXiv:2602.13486). raFLoRA averages each direction over the devices that trained it, by columns of the factors, which
are determined only up to B M and M⁻¹ A. Here the slices are the singular directions of each device's product, so the
result does not depend on the factorization.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.seeding import derive_seed
from models.lora.adapter import Adapter
from strategies.aggregation import Updates
from strategies.aggregation.factored import LowRankProduct, ProductSum, compress

RankWeights = Mapping[str, Mapping[int, float]]
"""By site and r_k: Σ p_k over the devices that trained r_k of its directions."""


class SliceMean:
    """Σ_j Σ {p_k σ_kj u_kj v_kjᵀ : r_k ≥ j} / P_j + B_g[:, R:] A_g[R:] of each site, with P_j = Σ {p_k : r_k ≥ j}.

    B_k A_k = Σ_j σ_kj u_kj v_kjᵀ is the singular value decomposition of the product that device k trained, with σ in
    descending order: slice j is the mean over the devices with at least j directions. (A_g, B_g) are the current
    factors and R is the largest r_k, beyond which everything stays unchanged. With equal ranks this is the mean of
    products; otherwise it intentionally is not, and a site whose devices agree but differ in rank gets their common
    product.

    Args:
        current: adapter that the round started from.
        ranks: rank weights of all devices that will be added.
        max_rank: see `strategies.aggregation.exact.ProductMean`.
        seed: see `strategies.aggregation.exact.ProductMean`.
    """

    def __init__(self, current: Adapter, ranks: RankWeights, *, max_rank: int | None, seed: int) -> None:
        self.current = current
        self.ranks = {rank for weights in ranks.values() for rank in weights}
        self._weights = ranks
        self._sums = {
            site: ProductSum(inputs=f.a.shape[1], outputs=len(f.b), max_rank=max_rank, seed=derive_seed(seed, site))
            for site, f in current.items()
        }

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add the update of one device."""
        for site, (a, b) in adapter.items():
            if size := len(a):
                weights = self._weights[site]
                product = compress(a, b, size)
                scales = [weight / sum(p for rank, p in weights.items() if rank > j) for j in range(len(product.a))]
                self._sums[site].add(product.a, product.b * product.b.new_tensor(scales))

    def best(self, site: str, *, max_rank: int | None, energy: float | None) -> LowRankProduct | None:
        """See `ProductMean.best`."""
        if not (weights := self._weights.get(site)):
            return None
        a, b = self.current[site]
        self._sums[site].add(a[max(weights) :], b[:, max(weights) :])
        return self._sums[site].best(max_rank=max_rank, energy=energy)


def rank_weights(updates: Updates) -> RankWeights:
    """Sum the weights of the devices by site and trained rank."""
    by_site: dict[str, dict[int, float]] = {}
    for adapter, weight in updates:
        for site, factors in adapter.items():
            if rank := len(factors.a):
                weights = by_site.setdefault(site, {})
                weights[rank] = weights.get(rank, 0.0) + weight
    return by_site
