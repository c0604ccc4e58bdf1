"""The mean of adapters slice by slice of their rank: what few devices have room for isn't divided among all.

To the mean of products a direction that a device has no room for is what was sent: what few devices train of it moves
by their share alone, and where it counts as zero it fades (rank collapse; Wu et al., 2026, arXiv:2602.13486). raFLoRA
takes each direction among those that trained it, by the columns of the factors, which are what they are only up to B M
and M⁻¹ A. Here it goes by the singular directions of each device's product, so that the result doesn't depend on how
that was factored.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.seeding import derive_seed
from models.lora.adapter import Adapter
from strategies.aggregation import Updates
from strategies.aggregation.factored import LowRankProduct, ProductSum, compress

Ranks = Mapping[str, Mapping[int, float]]
"""Of each site, Σ p_k over the devices that trained r_k of its directions, by r_k."""


class SliceMean:
    """Σ_j Σ {p_k σ_kj u_kj v_kjᵀ : r_k ≥ j} / P_j + B_g[:, R:] A_g[R:] of every site, with P_j = Σ {p_k : r_k ≥ j}.

    B_k A_k = Σ_j σ_kj u_kj v_kjᵀ is the singular value decomposition of what device k trained, in falling order of σ:
    slice j is the mean over the devices that had room for j directions. (A_g, B_g) are the current factors and R the
    largest r_k, beyond which everything stays. With equal ranks it is the mean of products; otherwise it is not, by
    intent, and a site whose devices agree but differ in rank gets their common product back.

    Args:
        ranks: of all devices that are going to be added.
        max_rank, seed: as for `strategies.aggregation.exact.Mean`.
    """

    def __init__(self, current: Adapter, ranks: Ranks, *, max_rank: int | None, seed: int) -> None:
        self.current = current
        self.ranks = {rank for of in ranks.values() for rank in of}
        self._taken = ranks
        self._sums = {
            site: ProductSum(inputs=f.a.shape[1], outputs=len(f.b), max_rank=max_rank, seed=derive_seed(seed, site))
            for site, f in current.items()
        }

    def add(self, adapter: Adapter, weight: float) -> None:
        """One more device."""
        for site, (a, b) in adapter.items():
            if size := len(a):
                taken = self._taken[site]
                found = compress(a, b, size)
                shares = [weight / sum(p for rank, p in taken.items() if rank > j) for j in range(len(found.a))]
                self._sums[site].add(found.a, found.b * found.b.new_tensor(shares))

    def best(self, site: str, *, max_rank: int | None, energy: float | None) -> LowRankProduct | None:
        """As `Mean.best`."""
        if not (taken := self._taken.get(site)):
            return None
        a, b = self.current[site]
        self._sums[site].add(a[max(taken) :], b[:, max(taken) :])
        return self._sums[site].best(max_rank=max_rank, energy=energy)


def rank_weights(updates: Updates) -> Ranks:
    """Who trained how many directions."""
    found: dict[str, dict[int, float]] = {}
    for adapter, weight in updates:
        for site, factors in adapter.items():
            if rank := len(factors.a):
                of = found.setdefault(site, {})
                of[rank] = of.get(rank, 0.0) + weight
    return found
