"""Merge kinds of steps, so that few distributions have to be composed.

A step with (σ, q) costs no more than one with (σ', q') if σ' ≤ σ and q' ≥ q, because its output is a post-processing of
the latter's output: add the missing noise, and with probability 1 − q/q' replace the output by that without the unit
(Poisson sampling of a sample). So kinds may be rounded and merged towards less noise and more sampling: merged kinds
are charged like the most expensive of them, and ε stays an upper bound. The ledger of an ordinary run has few kinds,
and none of them is changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

StepKind = tuple[float, float, int]
"""σ, q and the number of steps."""

MAX_KINDS = 12
"""Maximum number of kinds to compose. Each takes about 7 ms of a desktop's core on each grid."""
_MAX_PAIRWISE = 48
"""Maximum number of kinds for which the cheapest merge is sought over all pairs; more are rounded to a grid first."""
_MIN_WIDTH = 2.0**-9
"""Smallest width of that grid, as an exponent of two: steps of 0.14 %."""


def merge_kinds(kinds: Sequence[StepKind]) -> tuple[StepKind, ...]:
    """Merge kinds into at most `MAX_KINDS` kinds that together cost at least as much."""
    merged, width = list(kinds), _MIN_WIDTH
    while len(merged) > _MAX_PAIRWISE:
        merged, width = _round_kinds(kinds, width), 2 * width
    while len(merged) > MAX_KINDS:
        one, other = min(combinations(merged, 2), key=lambda pair: _added_cost(*pair))
        index = merged.index(one)
        merged[index] = _merge(one, other)
        merged.remove(other)
    return tuple(merged)


def _round_kinds(kinds: Sequence[StepKind], width: float) -> list[StepKind]:
    """Round every σ down and every q up to powers of 2^width, so that similar kinds become equal."""
    steps: Counter[tuple[float, float]] = Counter()
    for sigma, rate, count in kinds:
        steps[_round_down(sigma, width), 1 / _round_down(1 / rate, width)] += count
    return [(*kind, count) for kind, count in steps.items()]


def _round_down(value: float, width: float) -> float:
    """Return the largest power of 2^width that is at most `value`."""
    power = math.floor(math.log2(value) / width + 1e-9)  # the logarithm of a power may be a little under it
    while 2.0 ** (power * width) > value:
        power -= 1
    return 2.0 ** (power * width)


def _merge(one: StepKind, other: StepKind) -> StepKind:
    return min(one[0], other[0]), max(one[1], other[1]), one[2] + other[2]


def _added_cost(one: StepKind, other: StepKind) -> float:
    """Return the cost that a merge adds, measured by n (q/σ)², to which the cost of many weak steps is proportional."""
    return _cost(_merge(one, other)) - _cost(one) - _cost(other)


def _cost(kind: StepKind) -> float:
    sigma, rate, steps = kind
    return steps * (rate / sigma) ** 2
