"""What there is on each axis of a strategy, and which combinations are private.

A piece says itself what one device's influence on it comes to (`sensitivity`). The rules below go by that alone, so
that a new piece is refused under privacy until it says something, and then appears in docs/privacy.md with its words.
Secure aggregation and noise that is correlated over rounds have their place here as two more axes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from common.errors import AntherError
from strategies.aggregation import Linearity
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.flexlora import FlexLoRA
from strategies.aggregation.flora import FLoRA
from strategies.aggregation.hetlora import HetLoRA
from strategies.aggregation.raflora import RaFLoRA
from strategies.aggregation.rolora import RoLoRA
from strategies.fedbuff import REBASES
from strategies.robust import Filtering
from strategies.robust.afa import AFA
from strategies.robust.foolsgold import FoolsGold
from strategies.robust.geometric import GeometricMedian
from strategies.robust.krum import MultiKrum
from strategies.robust.norm import NormBound
from strategies.robust.replay import ReplayFilter
from strategies.robust.trimmed import Median, TrimmedMean
from strategies.selection import Sampling
from strategies.selection.deadline import Deadline
from strategies.selection.energy import Energy
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.everyone import Everyone
from strategies.selection.loss_fair import PowerOfChoice
from strategies.selection.oort import Oort
from strategies.selection.poisson import Poisson
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM, FedOpt, PostProcessing

NONE, EXAMPLE, DEVICE, BOTH = LEVELS = ("none", "example", "device", "both")


class TimingDeclaration(NamedTuple):
    """What a way to time rounds declares."""

    prechargeable: bool
    """Whether who takes part is settled, and charged for, before anybody is asked."""
    reason: str


class BuiltIn(NamedTuple):
    """A piece that is what the round loop does by itself."""

    sensitivity: TimingDeclaration | PostProcessing


AGGREGATIONS: dict[str, Any] = {
    "exact": Exact,
    "fedit": FedIT,
    "fedsa": FedSA,
    "fedsb": FedSB,
    "fedsvd": FedSVD,
    "ffa": FFA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "hetlora": HetLoRA,
    "raflora": RaFLoRA,
    "rolora": RoLoRA,
}
ROBUST_RULES: dict[str, Any] = {
    "replay": ReplayFilter,
    "norm_bound": NormBound,
    "krum": MultiKrum,
    "foolsgold": FoolsGold,
    "afa": AFA,
    "geometric_median": GeometricMedian,
    "median": Median,
    "trimmed_mean": TrimmedMean,
}
SELECTIONS: dict[str, Any] = {
    "everyone": Everyone,
    "random": Sample,
    "poisson": Poisson,
    "round_robin": RoundRobin,
    "oort": Oort,
    "eafl": Energy,
    "deadline": Deadline,
    "power_of_choice": PowerOfChoice,
    "energy_delay": EnergyDelay,
}
OPTIMIZERS: dict[str, Any] = {
    "none": BuiltIn(PostProcessing(reason="what a round released is the next adapter")),
    "fedavgm": FedAvgM,
    "fedadam": FedOpt,
    "fedyogi": FedOpt,
}
TIMINGS: dict[str, Any] = {
    "sync": BuiltIn(TimingDeclaration(prechargeable=True, reason="a round ends before the next begins")),
    "async": BuiltIn(
        TimingDeclaration(
            prechargeable=False, reason="who is in a round, and how often, is known when its last update has come"
        )
    ),
}


def lookup(axis: Mapping[str, Any], key: str, name: str) -> Any:
    """The piece that is registered under a name.

    Args:
        key: of the configuration that names it.

    Raises:
        AntherError: none is, so that nothing else runs in its place.
    """
    if name not in axis:
        raise AntherError(f"{key}={name}: nothing is registered under this name; known are {', '.join(axis)}")
    return axis[name]


def create(axis: Mapping[str, Any], key: str, name: str, settings: Mapping[str, Any]) -> Any:
    """A new piece, given those of the settings that it takes.

    Raises:
        AntherError: it is not registered, or takes a setting that there is none of.
    """
    piece = lookup(axis, key, name)
    takes = inspect.signature(piece).parameters.values()
    if lacking := [one.name for one in takes if one.default is one.empty and one.name not in settings]:
        raise AntherError(f"{key}={name}: it takes {', '.join(lacking)}, and is given {', '.join(settings)}")
    return piece(**{one.name: settings[one.name] for one in takes if one.name in settings})


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One choice on each axis, by name; of robust rules several, or none."""

    aggregation: str
    robust: tuple[str, ...] = ()
    selection: str
    timing: str = "sync"
    optimiser: str = "none"
    level: str


AXES: Mapping[str, Mapping[str, Any]] = {
    "aggregation": AGGREGATIONS,
    "robust": ROBUST_RULES,
    "selection": SELECTIONS,
    "timing": TIMINGS,
}
PLAINEST = Combination(aggregation="fedit", selection="everyone", level=NONE)
"""Private at every level, so that what is said of one piece beside it is said of that piece."""


def combination_with(axis: str, piece: str, *, level: str) -> Combination:
    """The plainest combination but for one axis, which has this piece."""
    found: dict[str, Any] = {axis: (piece,) if axis == "robust" else piece}
    return replace(PLAINEST, level=level, **found)


def combinations() -> Iterator[Combination]:
    """Every combination of what is registered, with one robust rule or none; a server optimiser, which refuses nothing
    that another piece does not, in none of them.
    """
    rules = [(), *((name,) for name in ROBUST_RULES)]
    for aggregation, robust, selection, timing, level in itertools.product(
        AGGREGATIONS, rules, SELECTIONS, TIMINGS, LEVELS
    ):
        yield Combination(aggregation=aggregation, robust=robust, selection=selection, timing=timing, level=level)


def incompatibility(chosen: Combination) -> str | None:
    """Why a combination does not go together, whatever it promises; None if it does."""
    for name in chosen.robust:
        if reason := robust_conflict(chosen.aggregation, name):
            return f"robust.rules: {reason}"
    reason = _unfit_for_async(chosen) if chosen.timing == "async" else None
    return reason and f"round_loop.mode=async: {reason}"


def robust_conflict(aggregation: str, rule: str) -> str | None:
    """Why a robust rule protects nothing before an aggregation; None if it does."""
    if aggregation == "fedsa":
        return (
            f"{rule} compares products, and with aggregation=fedsa every device keeps its own B: there is none to judge; "
            "leave it out, or use aggregation=fedit"
        )
    if aggregation == "hetlora" and rule in ("norm_bound", "geometric_median"):
        return (
            f"{rule} holds down what is large, and hetlora weighs devices by the norm of their product, which undoes "
            "it; use krum, or aggregation=exact"
        )
    return None


def _unfit_for_async(chosen: Combination) -> str | None:
    """Why rounds of these may not overlap."""
    if chosen.aggregation not in REBASES:
        fit = " or ".join(f"aggregation={name}" for name in REBASES)
        return f"{chosen.aggregation} can't take an update of an older adapter; use {fit}"
    if chosen.selection == "poisson":
        return "a coin for each device and round needs rounds that don't overlap; leave cohort.sampling_rate null"
    return None


def refusal_reason(chosen: Combination) -> str | None:
    """Why a combination does not go together, or can't be private at its level, in a line; None if it runs.

    Raises AntherError for a name that is not registered.
    """
    for key, axis, names in (
        ("aggregation.name", AGGREGATIONS, (chosen.aggregation,)),
        ("robust.rules", ROBUST_RULES, chosen.robust),
        ("selection", SELECTIONS, (chosen.selection,)),
        ("round_loop.mode", TIMINGS, (chosen.timing,)),
        ("server_optimizer.name", OPTIMIZERS, (chosen.optimiser,)),
    ):
        for name in names:
            lookup(axis, key, name)
    if reason := incompatibility(chosen):
        return reason
    linearity = _declared(AGGREGATIONS, chosen.aggregation, Linearity)
    filtering = {name: _declared(ROBUST_RULES, name, Filtering) for name in chosen.robust}
    sampling = _declared(SELECTIONS, chosen.selection, Sampling)
    timing = _declared(TIMINGS, chosen.timing, TimingDeclaration)
    optimiser = _declared(OPTIMIZERS, chosen.optimiser, PostProcessing)
    if chosen.level == NONE:
        return None
    silent = "declares no sensitivity, so nobody knows what one device, or one picture, does to it"
    if linearity is None:
        return f"aggregation {chosen.aggregation} {silent}"
    for name, declared in filtering.items():
        if declared is None:
            return f"robust rule {name} {silent}"
    if sampling is None:
        return f"selection {chosen.selection} {silent}"
    if timing is None:
        return f"timing {chosen.timing} {silent}"
    if optimiser is None:
        return f"optimiser {chosen.optimiser} {silent}"
    if not sampling.data_independent:
        return f"selection {chosen.selection} looks at what is private: {sampling.reason}"
    if chosen.level == EXAMPLE:
        return None  # what is made of updates that are private already is private too
    if sampling.uses_transient_state:
        return f"selection {chosen.selection} looks at what belongs to a device: {sampling.reason}"
    if not linearity.linear:
        return f"aggregation {chosen.aggregation} is not linear in the updates: {linearity.reason}"
    for name, declared in filtering.items():
        if not declared.bounded:
            return f"robust rule {name} inside the bound: {declared.reason}"
    if not timing.prechargeable:
        return f"timing {chosen.timing} can't be charged ahead: {timing.reason}"
    return None


def _declared(axis: Mapping[str, Any], name: str, kind: type) -> Any:
    """What a piece says of itself; None if it says nothing, or something that isn't of its axis."""
    found = getattr(axis[name], "sensitivity", None)
    return found if isinstance(found, kind) else None
