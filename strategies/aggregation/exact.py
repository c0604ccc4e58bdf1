"""Exact mean of the adapters' products in factored form, without any out × in matrix.

The factors of all devices are stacked, as in FLoRA (arXiv:2409.05976), compressed to the best adapter of a given rank
and rotated towards the factors of the previous round. Devices are added one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from copy import copy

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, Linearity, Updates, aggregation, check_updates, in_every_round
from strategies.aggregation.factored import LowRankProduct, ProductSum, pad
from strategies.aggregation.slices import SliceMean, rank_weights
from strategies.fedbuff import rebase_product


class ProductMean:
    """Σ p_k ΔW_k / Σ p_k of each site over the devices that trained it.

    Memory does not grow with the number of devices. Device k trained the first r_k directions of the current factors
    (A_g, B_g) and left the others unchanged, so ΔW_k = B_k A_k + B_g[:, r_k:] A_g[r_k:].

    Args:
        current: adapter that the round started from.
        max_rank: largest rank that `best` is called with; None: no limit.
        seed: seed of the random vectors that compress the sums.
    """

    def __init__(self, current: Adapter, *, max_rank: int | None, seed: int) -> None:
        self.current = current
        self.ranks: set[int] = set()  # ranks that devices trained at any site
        self._weights: dict[str, dict[int, float]] = {site: {} for site in current}  # Σ p_k by r_k
        self._sums = {
            site: ProductSum(inputs=f.a.shape[1], outputs=len(f.b), max_rank=max_rank, seed=derive_seed(seed, site))
            for site, f in current.items()
        }

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add the update of one device. Raises ValueError for a weight that is not positive."""
        check_updates([(adapter, weight)])
        for site, (a, b) in adapter.items():
            if size := a.shape[0]:
                self._sums[site].add(a, b, weight)
                weights = self._weights[site]
                weights[size] = weights.get(size, 0.0) + weight
                self.ranks.add(size)

    def best(self, site: str, *, max_rank: int | None, energy: float | None) -> LowRankProduct | None:
        """Compute the best low-rank approximation of the mean at a site; call it once, after the last `add`.

        Args:
            site: name of the site.
            max_rank: largest rank of the result; None: no limit.
            energy: fraction of Σ σ² to keep; None: all.

        Returns:
            The approximation, or None if no device trained the site.
        """
        weights, (a, b) = self._weights[site], self.current[site]
        if not weights:
            return None
        for size, weight in weights.items():
            self._sums[site].add(a[size:], b[:, size:], weight)
        best = self._sums[site].best(max_rank=max_rank, energy=energy)
        return best._replace(b=best.b / sum(weights.values()))


@aggregation("exact")
class Exact:
    """Mean of products, truncated to `max_rank` and to the directions required to keep the fraction `energy`.

    The rows of A in the result are orthonormal and B carries all the scale. Rows of a fresh A ~ N(0, 1/in) also have
    norm ≈ 1, so a learning rate has the same effect in every round. With √σ on both sides, A would shrink with the size
    of the update and the next round would make little progress.

    Args:
        rank: minimum rank of the result, which is padded if its rank is lower.
        max_rank: maximum rank of the result; None: no limit.
        energy_fraction: fraction of Σ σ² to keep; None: all.
        weighting: `device`; or `rank_slice`, which weights each slice of rank separately
            (`strategies.aggregation.slices`).
        seed: seed of the random vectors that compress sums and fill unused directions.
    """

    mixed_ranks = True
    stable_factors = False
    own_rank = True
    trains = staticmethod(in_every_round("both"))
    rebase = staticmethod(rebase_product)
    sensitivity = Linearity(
        linear=False,
        reason="a product of two factors is not linear in them, and the updates determine which and how many singular "
        "vectors are kept: clipping one update does not bound its effect on the mean",
    )

    def __init__(
        self,
        *,
        rank: int,
        max_rank: int | None = None,
        energy_fraction: float | None = None,
        weighting: str = "device",
        seed: int,
    ) -> None:
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"{max_rank=}: must be 1 or more, or null")
        if max_rank is not None and max_rank < rank:
            raise ValueError(f"{max_rank=}: must be at least adapter.shared.rank={rank}, or null")
        if energy_fraction is not None and not 0 < energy_fraction <= 1:
            raise ValueError(f"{energy_fraction=}: must be over 0 and at most 1, or null")
        if weighting not in ("device", "rank_slice"):
            raise ValueError(f"weighting={weighting}: must be one of: device, rank_slice")
        self.max_rank = max_rank
        self._rank, self._energy, self._seed = rank, energy_fraction, seed
        self.by_slice = weighting == "rank_slice"
        self._ranks: Collection[int] = ()

    def with_ranks(self, ranks: Collection[int]) -> Exact:
        """See `RankAware.with_ranks`."""
        rule = copy(self)
        rule._ranks = ranks
        return rule

    def start(self, current: Adapter) -> ProductMean:
        """Create the empty mean of a round."""
        return ProductMean(current, max_rank=self.max_rank, seed=derive_seed(self._seed, "compression"))

    def finish(self, mean: ProductMean | SliceMean, *, round: int) -> Aggregated:
        """Compute the adapter of a mean, with one rank at all sites.

        Diagnostics: `energy`, Σ kept σ² / Σ σ², and `residual`, the relative distance from the mean, both averaged over
        the trained sites; `rank` of the result; `live`, the largest number of directions with a nonzero B at any site.
        """
        factors_of: dict[str, Factors] = {}
        energies, live = [], 0
        for site, current in mean.current.items():
            best = mean.best(site, max_rank=self.max_rank, energy=self._energy)
            if best is None:
                factors_of[site] = current
                continue
            factors_of[site] = Factors(*align(best.a, best.b, current.a.double(), sorted(self._ranks or mean.ranks)))
            energies.append(best.energy)
            live = max(live, len(best.a))
        size = max(self._rank, *(len(factors.a) for factors in factors_of.values()))
        adapter = {
            site: pad(factors, size, derive_seed(self._seed, round, site, "dead directions"))
            for site, factors in factors_of.items()
        }
        # The truncated part is orthogonal to the kept one.
        residuals = [max(0.0, 1.0 - energy) ** 0.5 for energy in energies]
        trained = max(1, len(energies))
        diagnostics = {
            "rank": float(size),
            "live": float(live),
            "energy": sum(energies, 0.0 if energies else 1.0) / trained,
            "residual": sum(residuals) / trained,
        }
        return Aggregated(adapter, diagnostics)

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Aggregate all updates of a round: `start`, then `add` for each device, then `finish`."""
        check_updates(updates)
        mean: ProductMean | SliceMean = self.start(current)
        if self.by_slice:
            seed = derive_seed(self._seed, "compression")
            mean = SliceMean(current, rank_weights(updates), max_rank=self.max_rank, seed=seed)
        for adapter, weight in updates:
            mean.add(adapter, weight)
        return self.finish(mean, round=round)


def align(a: Tensor, b: Tensor, towards: Tensor, blocks: list[int]) -> tuple[Tensor, Tensor]:
    """Rotate the directions of B A so that A is as close as possible to the A of the previous round.

    Orthogonal Procrustes: the rotation Q that minimizes ‖Q A − A'‖_F is U Vᵀ of the SVD of A' Aᵀ (Schönemann, 1966).
    Directions rotate only within a block: before the first of `blocks`, between two of them, or after the last. A
    device that trains the first r directions therefore keeps the r strongest.

    Args:
        a: A `[r, in]`.
        b: B `[out, r]`.
        towards: A' `[r', in]`, the A of the previous round.
        blocks: ranks that devices train, ascending.

    Returns:
        Rotated A and B, with the same product.
    """
    edges = [0, *(edge for edge in blocks if edge < a.shape[0]), a.shape[0]]
    rows, columns = [], []
    for start, end in itertools.pairwise(edges):
        part = a[start:end]
        u, _, vh = torch.linalg.svd(towards[start:end] @ part.T, full_matrices=False)
        q = u @ vh if u.shape == (end - start,) * 2 else torch.eye(end - start, dtype=a.dtype)  # new directions
        rows.append(q @ part)
        columns.append(b[:, start:end] @ q.T)
    return torch.cat(rows), torch.cat(columns, dim=1)
