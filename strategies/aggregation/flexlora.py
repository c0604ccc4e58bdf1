"""FlexLoRA: the mean of full products, sent to each device at its own rank (Bai et al., 2024, arXiv:2402.11505).

Devices train the first r_k directions of the singular value decomposition of the mean. The paper forms the mean as a
matrix; here it is computed in factored form, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import (
    Aggregated,
    Linearity,
    SiteUpdates,
    Updates,
    aggregation,
    check_updates,
    in_every_round,
    site_updates,
)
from strategies.aggregation.factored import ProductSum, mean_residual, pad

NOT_LINEAR = Linearity(
    linear=False,
    reason="a product of two factors is not linear in them, and the updates determine which singular vectors are kept: "
    "clipping one update does not bound its effect",
    rotation_reason="the singular vectors of each round's mean differ from those of the previous round",
)


@aggregation("flexlora")
class FlexLoRA:
    """Σ p_k B_k A_k truncated to `rank`; the rows of A are orthonormal and B carries all the scale.

    In the paper, a device has no directions beyond its own rank, so it adds zero to their mean: directions that few
    devices train fade. Here a device keeps these directions frozen beside the trained ones, and they fade in the same
    way.
    """

    mixed_ranks = True
    stable_factors = False
    trains = staticmethod(in_every_round("both"))
    sensitivity = NOT_LINEAR

    def __init__(self, *, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Compute the best adapter of `rank` for the mean; diagnostics as in `truncated_sum`."""

        def products(before: Factors, trained: SiteUpdates) -> Sequence[tuple[Tensor, Tensor]]:  # noqa: ARG001
            return [(factors.a, p * factors.b) for factors, p in trained]

        return truncated_sum(current, updates, products, rank=self._rank, seed=derive_seed(self._seed, round))


def truncated_sum(
    current: Adapter,
    updates: Updates,
    terms: Callable[[Factors, SiteUpdates], Sequence[tuple[Tensor, Tensor]]],
    *,
    rank: int,
    seed: int,
) -> Aggregated:
    """Compute the best factors of `rank` for a sum of terms at each site.

    Diagnostics, averaged over the trained sites: `energy`, the fraction of the sum that truncation keeps, and
    `residual`, the relative distance of the result from the exact mean of the devices' products.

    Args:
        current: adapter that the round started from.
        updates: at least one update.
        terms: function from a site's current factors and updates to the factors A `[r, in]` and B `[out, r]` of each
            term.
        rank: rank of the result.
        seed: seed of the random vectors, and of A in directions that the sum does not have.
    """
    check_updates(updates)
    adapter, energies, residuals = dict(current), [], []
    for site, before in current.items():
        if not (trained := site_updates(updates, site)):
            continue
        total = ProductSum(inputs=before.a.shape[1], outputs=len(before.b), max_rank=rank, seed=derive_seed(seed, site))
        for a, b in terms(before, trained):
            total.add(a, b)
        best = total.best(max_rank=rank)
        adapter[site] = pad(Factors(best.a, best.b), rank, derive_seed(seed, site, "dead directions"))
        energies.append(best.energy)
        residuals.append(mean_residual(adapter[site], before, trained))
    count = max(1, len(residuals))
    energy = sum(energies) / count if energies else 1.0
    return Aggregated(adapter, {"rank": float(rank), "energy": energy, "residual": sum(residuals) / count})
