"""Trimmed mean and median of each entry of the product (Yin et al., 2018, arXiv:1803.01498, definitions 1 and 2).

The results have no factors: they are computed in blocks of rows and compressed block by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation.factored import ProductSum, pad
from strategies.robust import EntrywiseRule, Filtering, robust_rule
from strategies.robust.krum import count

_ENTRIES = 2**22  # entries of all devices together in one block
_ROWS = 256  # largest number of rows in a block: each one is a direction of the sum until it is compressed


@robust_rule("trimmed_mean")
class TrimmedMean:
    """Mean of each entry without the largest and smallest values.

    Every device counts equally, whatever its weight. While outliers are no more than the fraction, each entry lies
    within the range of the other devices' values.

    Args:
        outlier_fraction: fraction of the devices that is removed at each end; at least one or two values remain.
    """

    sensitivity = Filtering(
        bounded=False,
        reason="the other values of an entry determine which value counts: clipping one does not bound its effect",
    )

    def __init__(self, *, outlier_fraction: float = 0.2) -> None:
        if not 0 <= outlier_fraction < 0.5:
            raise ValueError(f"{outlier_fraction=}: must be 0 or more, and under 0.5")
        self._outliers = outlier_fraction

    def combine(self, changes: Tensor) -> Tensor:
        n = len(changes)
        cut = min(count(self._outliers, n), (n - 1) // 2)
        return changes.sort(dim=0).values[cut : n - cut].mean(dim=0)


@robust_rule("median")
class Median(TrimmedMean):
    """Median of each entry, or the mean of the two middle values."""

    def __init__(self) -> None:
        super().__init__()
        self._outliers = 0.5  # one or two values remain


def combine_updates(
    rule: EntrywiseRule, current: Adapter, devices: Sequence[tuple[Adapter, float]], *, rank: int | None, seed: int
) -> Adapter:
    """Compute the adapter whose product at each site is the current one plus the combined change.

    Memory: a few times 2²² float64 entries (32 MiB), or one row of all devices if that is more, and the factors of a
    `ProductSum`.

    Args:
        rule: combines the changes entry by entry.
        current: adapter that the round started from.
        devices: adapter of each device, and the scale of its change.
        rank: largest rank of the result at a site, but no smaller than the current one; None: no limit.
        seed: seed of the random vectors for compression, and of A in unused directions.
    """
    combined = {}
    for name, site in current.items():
        trained = [(adapter[name], s) for adapter, s in devices if name in adapter and len(adapter[name].a)]
        if trained:
            combined[name] = _combine_site(
                rule, site, trained, rank and max(rank, len(site.a)), derive_seed(seed, name)
            )
    return combined


def _combine_site(
    rule: EntrywiseRule, site: Factors, trained: list[tuple[Factors, float]], rank: int | None, seed: int
) -> Factors:
    inputs, outputs = site.a.shape[1], len(site.b)
    total = ProductSum(inputs=inputs, outputs=outputs, max_rank=rank, seed=seed)
    total.add(site.a, site.b)
    step = max(1, min(_ROWS, _ENTRIES // (len(trained) * inputs)))
    for first in range(0, outputs, step):
        rows = slice(first, min(first + step, outputs))
        changes = torch.stack([s * _change(site, factors, rows) for factors, s in trained])
        unit_columns = torch.zeros(outputs, rows.stop - first)
        unit_columns[rows] = torch.eye(rows.stop - first)
        total.add(rule.combine(changes), unit_columns)
    best = total.best(max_rank=rank)
    return pad(Factors(best.a, best.b), max(len(best.a), len(site.a)), derive_seed(seed, "dead directions"))


def _change(site: Factors, factors: Factors, rows: slice) -> Tensor:
    """Compute some rows of B A − B_g[:, :r] A_g[:r], float64 `[rows, in]`."""
    r = len(factors.a)
    return factors.b[rows].double() @ factors.a.double() - site.b[rows, :r].double() @ site.a[:r].double()
