"""Trimmed mean and median of each entry of the product (Yin et al., 2018, arXiv:1803.01498, definitions 1 and 2).

They have no factors: the result is made in blocks of rows, and compressed as they come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation.factored import ProductSum, pad
from strategies.robust import EntrywiseRule, Filtering
from strategies.robust.krum import count

_ENTRIES = 2**22  # of all devices together that are looked at at once
_ROWS = 256  # of a site, at most: each is a direction of the sum until it is compressed


class TrimmedMean:
    """The mean of each entry without so many of the largest and so many of the smallest values.

    Every device counts alike, whatever its weight. While no more than the share are outliers, each entry lies between
    the least and the most of the others'.

    Args:
        outliers: share of the devices that is left out at each end; one or two values stay at least.
    """

    sensitivity = Filtering(
        bounded=False, reason="which value of an entry counts follows from the others': no clip of one bounds it"
    )

    def __init__(self, *, outliers: float) -> None:
        if not 0 <= outliers <= 0.5:
            raise ValueError(f"{outliers=}: must be 0 or more and at most half")
        self._outliers = outliers

    def combine(self, changes: Tensor) -> Tensor:
        n = len(changes)
        cut = min(count(self._outliers, n), (n - 1) // 2)
        return changes.sort(dim=0).values[cut : n - cut].mean(dim=0)


class Median(TrimmedMean):
    """What is in the middle, or the mean of the two that are."""

    def __init__(self) -> None:
        super().__init__(outliers=0.5)


def combined(
    rule: EntrywiseRule, current: Adapter, devices: Sequence[tuple[Adapter, float]], *, rank: int | None, seed: int
) -> Adapter:
    """The one adapter whose product at each site is the current one and what the rule makes of the changes.

    Takes the room of 2²² entries in float64, 32 MiB, a few times over, and of the factors of a `ProductSum`; of one row, if
    all devices' have more entries.

    Args:
        devices: each one's adapter, and how much of its change counts.
        rank: the most directions that the result has at a site, though no fewer than the current one; None: all.
        seed: of the vectors that it is compressed with, and of A in directions that it has not.
    """
    found = {}
    for name, site in current.items():
        there = [(adapter[name], s) for adapter, s in devices if name in adapter and len(adapter[name].a)]
        if there:
            found[name] = _at(rule, site, there, rank and max(rank, len(site.a)), derive_seed(seed, name))
    return found


def _at(rule: EntrywiseRule, site: Factors, there: list[tuple[Factors, float]], rank: int | None, seed: int) -> Factors:
    inputs, outputs = site.a.shape[1], len(site.b)
    total = ProductSum(inputs=inputs, outputs=outputs, max_rank=rank, seed=seed)
    total.add(site.a, site.b)
    step = max(1, min(_ROWS, _ENTRIES // (len(there) * inputs)))
    for first in range(0, outputs, step):
        rows = slice(first, min(first + step, outputs))
        changes = torch.stack([s * _change(site, factors, rows) for factors, s in there])
        places = torch.zeros(outputs, rows.stop - first)
        places[rows] = torch.eye(rows.stop - first)
        total.add(rule.combine(changes), places)
    best = total.best(max_rank=rank)
    return pad(Factors(best.a, best.b), max(len(best.a), len(site.a)), derive_seed(seed, "dead directions"))


def _change(site: Factors, factors: Factors, rows: slice) -> Tensor:
    """Some rows of B A − B_g[:, :r] A_g[:r], float64 [rows, in]."""
    r = len(factors.a)
    return factors.b[rows].double() @ factors.a.double() - site.b[rows, :r].double() @ site.a[:r].double()
