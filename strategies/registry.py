"""What there is on each axis of a strategy, and which combinations are private.

A piece says itself what one device's influence on it comes to (`sensitivity`). The rules below go by that alone, so
that a new piece is refused under privacy until it says something, and then appears in docs/privacy.md with its words.
Secure aggregation and noise that is correlated over rounds have their place here as two more axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from strategies.aggregation import Linearity
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.flexlora import FlexLoRA
from strategies.aggregation.flora import FLoRA
from strategies.aggregation.hetlora import HetLoRA
from strategies.aggregation.raflora import RaFLoRA
from strategies.optimisers import FedAvgM, FedOpt, Released
from strategies.selection import Sampling
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
from strategies.selection.sample import Sample

NONE, EXAMPLE, DEVICE, BOTH = LEVELS = ("none", "example", "device", "both")


class Filtering(NamedTuple):
    """What a robust rule declares."""

    bounded: bool
    """Whether one device still moves the sum by its clip at most. Not with a rule that keeps or drops an update for
    what the others are: one device then decides about the others'."""
    reason: str


class Timing(NamedTuple):
    """What a way to time rounds declares."""

    ahead: bool
    """Whether who takes part is settled, and charged for, before anybody is asked."""
    reason: str


class Inherent(NamedTuple):
    """A piece that is what the round loop does by itself."""

    sensitivity: Filtering | Timing | Released


AGGREGATIONS: dict[str, Any] = {
    "exact": Exact,
    "fedit": FedIT,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "hetlora": HetLoRA,
    "raflora": RaFLoRA,
}
ROBUST: dict[str, Any] = {"none": Inherent(Filtering(bounded=True, reason="every update that passes the gate counts"))}
SELECTIONS: dict[str, Any] = {"everyone": Everyone, "sample": Sample, "poisson": Poisson}
OPTIMISERS: dict[str, Any] = {
    "none": Inherent(Released(reason="what a round released is the next adapter")),
    "fedavgm": FedAvgM,
    "fedadam": FedOpt,
    "fedyogi": FedOpt,
}
TIMINGS: dict[str, Any] = {"sync": Inherent(Timing(ahead=True, reason="a round ends before the next begins"))}


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One choice on each axis, by name."""

    aggregation: str
    robust: str = "none"
    selection: str
    timing: str = "sync"
    optimiser: str = "none"
    level: str


def combinations() -> Iterator[Combination]:
    """Every combination of what is registered; a server optimiser, which changes no cell, in none of them."""
    for aggregation, robust, selection, timing, level in itertools.product(
        AGGREGATIONS, ROBUST, SELECTIONS, TIMINGS, LEVELS
    ):
        yield Combination(aggregation=aggregation, robust=robust, selection=selection, timing=timing, level=level)


def refusal(chosen: Combination) -> str | None:
    """Why a combination can't be private at its level, in a line; None if it can, or doesn't mean to be.

    Raises KeyError for a name that is not registered.
    """
    linearity = _declared(AGGREGATIONS, chosen.aggregation, Linearity)
    filtering = _declared(ROBUST, chosen.robust, Filtering)
    sampling = _declared(SELECTIONS, chosen.selection, Sampling)
    timing = _declared(TIMINGS, chosen.timing, Timing)
    optimiser = _declared(OPTIMISERS, chosen.optimiser, Released)
    if chosen.level == NONE:
        return None
    silent = "declares no sensitivity, so nobody knows what one device, or one picture, does to it"
    if linearity is None:
        return f"aggregation {chosen.aggregation} {silent}"
    if filtering is None:
        return f"robust rule {chosen.robust} {silent}"
    if sampling is None:
        return f"selection {chosen.selection} {silent}"
    if timing is None:
        return f"timing {chosen.timing} {silent}"
    if optimiser is None:
        return f"optimiser {chosen.optimiser} {silent}"
    if not sampling.blind:
        return f"selection {chosen.selection} looks at what is private: {sampling.reason}"
    if chosen.level == EXAMPLE:
        return None  # what is made of updates that are private already is private too
    if not linearity.linear:
        return f"aggregation {chosen.aggregation} is not linear in the updates: {linearity.reason}"
    if not filtering.bounded:
        return f"robust rule {chosen.robust} inside the bound: {filtering.reason}"
    if not timing.ahead:
        return f"timing {chosen.timing} can't be charged ahead: {timing.reason}"
    return None


def _declared(axis: Mapping[str, Any], name: str, kind: type) -> Any:
    """What a piece says of itself; None if it says nothing, or something that isn't of its axis."""
    found = getattr(axis[name], "sensitivity", None)
    return found if isinstance(found, kind) else None
