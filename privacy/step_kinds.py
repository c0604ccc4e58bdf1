"""Kinds of steps in a ledger, few enough to compose: merged kinds are charged as the worst of them.

A step of (σ, q) costs no more than one of (σ', q') with σ' ≤ σ and q' ≥ q, because its output is a post-processing of
the latter's output: add the missing noise, and with probability 1 − q/q' replace the output by that without the unit
(Poisson sampling of a sample). So kinds may be rounded and merged towards less noise and more sampling; ε is then an
upper bound. A ledger of ordinary runs has few kinds, and none of them is changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

Kind = tuple[float, float, int]
"""σ, q and the number of steps."""

MOST = 12
"""Most kinds to compose: each takes about 7 ms of a desktop's core on each grid."""
_PAIRED = 48
"""Most kinds for which the cheapest merge is sought over all pairs; more kinds are rounded to a grid first."""
_FINEST = 2.0**-9
"""Finest width of that grid, as an exponent of two: steps of 0.14 %."""


def merge_kinds(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Merge kinds into at most `MOST` kinds that together cost at least as much."""
    found, width = list(kinds), _FINEST
    while len(found) > _PAIRED:
        found, width = _rounded(kinds, width), 2 * width
    while len(found) > MOST:
        one, other = min(combinations(found, 2), key=lambda pair: _added(*pair))
        place = found.index(one)
        found[place] = _both(one, other)
        found.remove(other)
    return tuple(found)


def _rounded(kinds: Sequence[Kind], width: float) -> list[Kind]:
    """Round every σ down and every q up to powers of 2^width, so that similar kinds become equal."""
    steps: Counter[tuple[float, float]] = Counter()
    for sigma, rate, count in kinds:
        steps[_down(sigma, width), 1 / _down(1 / rate, width)] += count
    return [(*kind, count) for kind, count in steps.items()]


def _down(value: float, width: float) -> float:
    """Return the largest power of 2^width that is at most `value`."""
    power = math.floor(math.log2(value) / width + 1e-9)  # the logarithm of a power may be a little under it
    while 2.0 ** (power * width) > value:
        power -= 1
    return 2.0 ** (power * width)


def _both(one: Kind, other: Kind) -> Kind:
    return min(one[0], other[0]), max(one[1], other[1]), one[2] + other[2]


def _added(one: Kind, other: Kind) -> float:
    """Return the cost that merging two kinds adds, by n (q/σ)²: the cost of many weak steps is proportional to it."""
    return _weight(_both(one, other)) - _weight(one) - _weight(other)


def _weight(kind: Kind) -> float:
    sigma, rate, steps = kind
    return steps * (rate / sigma) ** 2
