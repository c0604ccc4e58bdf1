"""Which sets of sites are worth training at: a knapsack by memory and time (after Fed-pilot, arXiv:2410.10200).

A set's memory and time follow from the first of its sites that a pass comes to, and from each site by itself
(`models.footprint.site_costs`). So sets are built from the last site forwards, as a knapsack's partial solutions are, and a set that
another one beats in memory, time and gain at once is left out (Nemhauser & Ullmann, 1969). All devices share one list;
each takes the best that it can hold, so that more memory is never worse.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from models.footprint.site_costs import PassCosts

MOST = 128
"""Partial sets that are kept. Up to seven sites nothing is lost; of more, gains that lie close stand for each other."""


class SiteSet(NamedTuple):
    """A set of sites, and what it comes to."""

    bytes: int
    """The most that a pass holds."""
    work: float
    """Time of a pass, as a share of one at every site."""
    gain: float
    """Share of what training at every site is worth."""
    sites: tuple[str, ...]


class _Part(NamedTuple):
    """Some sites without what comes before them."""

    bytes: int
    work: float
    gain: float
    first: str | None = None
    rest: _Part | None = None

    def names(self) -> Iterator[str]:
        part: _Part | None = self
        while part is not None and part.first is not None:
            yield part.first
            part = part.rest


def choices(costs: PassCosts, gains: Mapping[str, float], *, most: int = MOST) -> list[SiteSet]:
    """Sets of sites, one of all among them, and each site by itself unless another set beats it.

    Args:
        gains: of each site, 0 or more; those of all together are 1.
        most: partial sets that are kept. With 2^(number of sites) of them the list holds the best set for any limits.
    """
    found: list[SiteSet] = []
    parts = [_Part(0, 0.0, 0.0)]
    for site in reversed(costs.sites):
        longer = [
            _Part(
                part.bytes + site.site_bytes, part.work + site.site_work, part.gain + gains[site.name], site.name, part
            )
            for part in parts
        ]
        found += [
            SiteSet(site.peak_bytes + part.bytes, site.work + part.work, part.gain, tuple(part.names()))
            for part in longer
        ]
        parts = _thinned(_unbeaten([*parts, *longer]), most)
    return found


def _unbeaten(parts: list[_Part]) -> list[_Part]:
    """Those that no other has as much gain as, in as few bytes and as little work; by falling gain."""
    kept: list[_Part] = []
    stairs: list[tuple[int, float]] = []  # of all kept so far: bytes rise, work falls
    for part in sorted(parts, key=lambda part: (-part.gain, part.bytes, part.work)):
        at = bisect_left(stairs, (part.bytes, float("inf")))
        if at and stairs[at - 1][1] <= part.work:
            continue
        end = at
        while end < len(stairs) and stairs[end][1] >= part.work:
            end += 1
        stairs[at:end] = [(part.bytes, part.work)]
        kept.append(part)
    return kept


def _thinned(parts: list[_Part], most: int) -> list[_Part]:
    """At most so many of them, from the first to the last in equal steps."""
    if len(parts) <= most:
        return parts
    return [parts[round(place * (len(parts) - 1) / (most - 1))] for place in range(most)]
