"""The true mean of the adapters' products, in factored form: no out × in matrix is ever made.

The factors of all devices (stacked, as in FLoRA, arXiv:2409.05976) are compressed to the best adapter of a given rank,
and turned towards the last round's factors. Devices are taken in one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from copy import copy

import torch
from torch import Tensor

from common.errors import AntherError
from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, Linearity, Updates, always, check
from strategies.aggregation.factored import LowRankProduct, ProductSum, pad
from strategies.aggregation.slices import SliceMean, rank_weights


class Mean:
    """Σ p_k ΔW_k / Σ p_k of every site over the devices that trained it, in memory that doesn't grow with their number.

    Device k trained the first r_k directions of the current factors (A_g, B_g) and left the others as they were, so
    ΔW_k = B_k A_k + B_g[:, r_k:] A_g[r_k:].

    Args:
        max_rank: the most directions that are going to be asked for; None: all.
        seed: of the random vectors that sums are compressed with.
    """

    def __init__(self, current: Adapter, *, max_rank: int | None, seed: int) -> None:
        self.current = current
        self.ranks: set[int] = set()  # that devices trained, anywhere
        self._weights: dict[str, dict[int, float]] = {site: {} for site in current}  # Σ p_k by r_k
        self._sums = {
            site: ProductSum(inputs=f.a.shape[1], outputs=len(f.b), max_rank=max_rank, seed=derive_seed(seed, site))
            for site, f in current.items()
        }

    def add(self, adapter: Adapter, weight: float) -> None:
        """One more device. ValueError for a weight that is not over 0."""
        check([(adapter, weight)])
        for site, (a, b) in adapter.items():
            if size := a.shape[0]:
                self._sums[site].add(a, b, weight)
                weights = self._weights[site]
                weights[size] = weights.get(size, 0.0) + weight
                self.ranks.add(size)

    def best(self, site: str, *, max_rank: int | None, energy: float | None) -> LowRankProduct | None:
        """The best approximation of a site's mean, which nothing can be added to then; None if nobody trained it."""
        weights, (a, b) = self._weights[site], self.current[site]
        if not weights:
            return None
        for size, weight in weights.items():
            self._sums[site].add(a[size:], b[:, size:], weight)
        found = self._sums[site].best(max_rank=max_rank, energy=energy)
        return found._replace(b=found.b / sum(weights.values()))


class Exact:
    """Mean of products, truncated to `max_rank` and to what `energy` needs (None: every direction that is there).

    The factors come out with A's rows orthonormal and all scale in B. Rows of a fresh A, N(0, 1/in), have norm ≈ 1 too,
    so a learning rate means the same in every round; with √σ on both sides A would shrink by the size of the update
    and the next round would hardly move.

    Args:
        by_slice: weigh every slice of rank by itself (`strategies.aggregation.slices`).
    """

    mixed_ranks = True
    stable_factors = False
    trains = staticmethod(always("both"))
    sensitivity = Linearity(
        linear=False,
        reason="a product of two factors isn't linear in them, and the singular vectors that are kept, and how many, "
        "follow from the updates: no clip of one bounds what it does to the mean",
    )

    def __init__(
        self, *, rank: int, max_rank: int | None, energy: float | None = None, by_slice: bool = False, seed: int
    ) -> None:
        if max_rank is not None and max_rank < rank:
            raise AntherError(f"aggregation.max_rank={max_rank}: must be at least adapter.shared.rank={rank}, or null")
        self._rank, self._max_rank, self._energy, self._seed = rank, max_rank, energy, seed
        self._by_slice = by_slice
        self._ranks: Collection[int] = ()

    def with_ranks(self, ranks: Collection[int]) -> Exact:
        """As of `RankAware`."""
        found = copy(self)
        found._ranks = ranks
        return found

    def start(self, current: Adapter) -> Mean:
        """A round without a device yet."""
        return Mean(current, max_rank=self._max_rank, seed=derive_seed(self._seed, "compression"))

    def finish(self, mean: Mean | SliceMean, *, round: int) -> Aggregated:
        """The mean product at one rank for all sites.

        Diagnostics, means over the sites that were trained: `energy`, Σ kept σ² / Σ σ², and `residual`, the relative
        distance from the mean; `rank`, of the result; `live`, its most directions with a B that is not zero.
        """
        found: dict[str, Factors] = {}
        energies, live = [], 0
        for site, current in mean.current.items():
            best = mean.best(site, max_rank=self._max_rank, energy=self._energy)
            if best is None:
                found[site] = current
                continue
            found[site] = Factors(*align(best.a, best.b, current.a.double(), sorted(self._ranks or mean.ranks)))
            energies.append(best.energy)
            live = max(live, len(best.a))
        size = max(self._rank, *(len(factors.a) for factors in found.values()))
        adapter = {
            site: pad(factors, size, derive_seed(self._seed, round, site, "dead directions"))
            for site, factors in found.items()
        }
        # What was cut is orthogonal to what was kept.
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
        """All of a round at once, as `start`, `Mean.add` and `finish` make it of one device after another."""
        check(updates)
        mean: Mean | SliceMean = self.start(current)
        if self._by_slice:
            seed = derive_seed(self._seed, "compression")
            mean = SliceMean(current, rank_weights(updates), max_rank=self._max_rank, seed=seed)
        for adapter, weight in updates:
            mean.add(adapter, weight)
        return self.finish(mean, round=round)


def align(a: Tensor, b: Tensor, towards: Tensor, blocks: list[int]) -> tuple[Tensor, Tensor]:
    """Rotate the directions so that A is as near as it can be to the last round's A; the product stays.

    Orthogonal Procrustes: min ‖Q A − A'‖_F over rotations Q is U Vᵀ of the SVD of A' Aᵀ (Schönemann, 1966).
    Directions rotate only among those before the first of `blocks`, between two of them, or after the last, which are
    the ranks that devices train: whoever trains the first r still holds the r strongest.
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
