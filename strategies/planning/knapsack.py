"""Sets of sites worth training: a knapsack over memory and time (after Fed-pilot, arXiv:2410.10200).

Memory and time of a set follow from the first of its sites in the order of a forward pass, and from each site
separately (`models.footprint.site_costs`). Sets are therefore built from the last site forwards, like partial solutions
of a knapsack, and a set that another one dominates in memory, time and gain is dropped (Nemhauser & Ullmann, 1969). All
devices share one list, and each takes the best set that fits, so that more memory is never worse.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from models.footprint.site_costs import PassCosts

MAX_PARTIAL_SETS = 128
"""Maximum number of partial sets. With up to seven sites none is dropped; with more, sets of similar gain are thinned
out."""


class SiteSet(NamedTuple):
    """Set of sites, with its costs and gain."""

    bytes: int
    """Peak memory of a pass."""
    work: float
    """Time of a pass, as a fraction of a pass that trains every site."""
    gain: float
    """Gain, as a fraction of that of training every site."""
    sites: tuple[str, ...]


class _PartialSet(NamedTuple):
    """Some sites, without the costs of the layers before them."""

    bytes: int
    work: float
    gain: float
    first: str | None = None
    rest: _PartialSet | None = None

    def names(self) -> Iterator[str]:
        part: _PartialSet | None = self
        while part is not None and part.first is not None:
            yield part.first
            part = part.rest


def site_sets(costs: PassCosts, gains: Mapping[str, float], *, max_partial: int = MAX_PARTIAL_SETS) -> list[SiteSet]:
    """List sets of sites, including the set of all, and each single site unless another set dominates it.

    Args:
        costs: costs of each site.
        gains: gain of each site, 0 or more, with the sum 1.
        max_partial: maximum number of partial sets. With 2^(number of sites), the list contains the best set for any
            limits.
    """
    sets: list[SiteSet] = []
    partial_sets = [_PartialSet(0, 0.0, 0.0)]
    for site in reversed(costs.sites):
        extended = [
            _PartialSet(
                part.bytes + site.site_bytes, part.work + site.site_work, part.gain + gains[site.name], site.name, part
            )
            for part in partial_sets
        ]
        sets += [
            SiteSet(site.peak_bytes + part.bytes, site.work + part.work, part.gain, tuple(part.names()))
            for part in extended
        ]
        partial_sets = _thin(_pareto_front([*partial_sets, *extended]), max_partial)
    return sets


def _pareto_front(parts: list[_PartialSet]) -> list[_PartialSet]:
    """Drop sets that another one matches in gain with no more bytes and work; sort by descending gain."""
    front: list[_PartialSet] = []
    stairs: list[tuple[int, float]] = []  # of all sets so far: bytes ascending, work descending
    for part in sorted(parts, key=lambda part: (-part.gain, part.bytes, part.work)):
        at = bisect_left(stairs, (part.bytes, float("inf")))
        if at and stairs[at - 1][1] <= part.work:
            continue
        end = at
        while end < len(stairs) and stairs[end][1] >= part.work:
            end += 1
        stairs[at:end] = [(part.bytes, part.work)]
        front.append(part)
    return front


def _thin(parts: list[_PartialSet], limit: int) -> list[_PartialSet]:
    """Keep at most `limit` sets, equally spaced from the first to the last."""
    if len(parts) <= limit:
        return parts
    return [parts[round(index * (len(parts) - 1) / (limit - 1))] for index in range(limit)]
