"""Registries of the components on each axis of a strategy, and rules for the combinations that can be private.

Each component declares the influence of one device on it (`sensitivity`). The rules below use only these declarations:
a new component is refused under privacy until it has one, and then appears in docs/privacy.md with its reason. Secure
aggregation, and noise that is correlated over rounds, would be two more axes.
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
from strategies.selection.eafl import EAFL
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.everyone import Everyone
from strategies.selection.oort import Oort
from strategies.selection.poisson import Poisson
from strategies.selection.power_of_choice import PowerOfChoice
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM, FedOpt, PostProcessing

NONE, EXAMPLE, DEVICE, BOTH = LEVELS = ("none", "example", "device", "both")


class TimingDeclaration(NamedTuple):
    """Sensitivity declaration of a round mode."""

    prechargeable: bool
    """Whether the participants of a round are known, and charged for, before any device is contacted."""
    reason: str


class BuiltIn(NamedTuple):
    """Component that the round loop implements itself."""

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
    "eafl": EAFL,
    "deadline": Deadline,
    "power_of_choice": PowerOfChoice,
    "energy_delay": EnergyDelay,
}
OPTIMIZERS: dict[str, Any] = {
    "none": BuiltIn(PostProcessing(reason="the release of a round is the next adapter")),
    "fedavgm": FedAvgM,
    "fedadam": FedOpt,
    "fedyogi": FedOpt,
}
TIMINGS: dict[str, Any] = {
    "sync": BuiltIn(TimingDeclaration(prechargeable=True, reason="a round ends before the next begins")),
    "async": BuiltIn(
        TimingDeclaration(
            prechargeable=False,
            reason="the devices of a round, and their numbers of updates, are known only after its last update",
        )
    ),
}


def lookup(axis: Mapping[str, Any], key: str, name: str) -> Any:
    """Return the component that is registered under a name.

    Args:
        axis: registry.
        key: configuration key that names the component.
        name: its name.

    Raises:
        AntherError: no component has this name. There is no fallback.
    """
    if name not in axis:
        raise AntherError(f"{key}={name}: nothing is registered under this name; known are {', '.join(axis)}")
    return axis[name]


def create(axis: Mapping[str, Any], key: str, name: str, settings: Mapping[str, Any]) -> Any:
    """Create a component with those settings that it accepts.

    Args:
        axis: registry.
        key: configuration key that names the component.
        name: its name.
        settings: available settings by parameter name.

    Raises:
        AntherError: it is not registered, or requires a setting that is not available.
    """
    component = lookup(axis, key, name)
    parameters = inspect.signature(component).parameters.values()
    if missing := [one.name for one in parameters if one.default is one.empty and one.name not in settings]:
        raise AntherError(f"{key}={name}: it requires {', '.join(missing)}; available are {', '.join(settings)}")
    return component(**{one.name: settings[one.name] for one in parameters if one.name in settings})


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Names of the components on each axis; any number of robust rules, one of everything else."""

    aggregation: str
    robust: tuple[str, ...] = ()
    selection: str
    timing: str = "sync"
    optimizer: str = "none"
    level: str


AXES: Mapping[str, Mapping[str, Any]] = {
    "aggregation": AGGREGATIONS,
    "robust": ROBUST_RULES,
    "selection": SELECTIONS,
    "timing": TIMINGS,
}
BASELINE = Combination(aggregation="fedit", selection="everyone", level=NONE)
"""Private at every level, so that a refusal of it with one other component is due to that component."""


def combination_with(axis: str, component: str, *, level: str) -> Combination:
    """Return the baseline with one component replaced.

    Args:
        axis: axis of the component.
        component: its name.
        level: privacy level.
    """
    changes: dict[str, Any] = {axis: (component,) if axis == "robust" else component}
    return replace(BASELINE, level=level, **changes)


def combinations() -> Iterator[Combination]:
    """Yield every combination with at most one robust rule.

    Server optimizers are left out: they refuse nothing that another component does not.
    """
    rules = [(), *((name,) for name in ROBUST_RULES)]
    for aggregation, robust, selection, timing, level in itertools.product(
        AGGREGATIONS, rules, SELECTIONS, TIMINGS, LEVELS
    ):
        yield Combination(aggregation=aggregation, robust=robust, selection=selection, timing=timing, level=level)


def incompatibility(combination: Combination) -> str | None:
    """Return why a combination can't run at any privacy level; None if it can."""
    for name in combination.robust:
        if reason := robust_conflict(combination.aggregation, name):
            return f"robust.rules: {reason}"
    reason = _async_conflict(combination) if combination.timing == "async" else None
    return reason and f"round_loop.mode=async: {reason}"


def robust_conflict(aggregation: str, rule: str) -> str | None:
    """Return why a robust rule has no effect with an aggregation; None if it has."""
    if aggregation == "fedsa":
        return (
            f"{rule} compares products, and with aggregation=fedsa every device keeps its own B, so there is none; "
            "remove it, or use aggregation=fedit"
        )
    if aggregation == "hetlora" and rule in ("norm_bound", "geometric_median"):
        return (
            f"{rule} reduces large products, and hetlora weights devices by the norm of their product, which undoes "
            "it; use krum, or aggregation=exact"
        )
    return None


def _async_conflict(combination: Combination) -> str | None:
    """Return why rounds of a combination can't overlap; None if they can."""
    if combination.aggregation not in REBASES:
        alternatives = " or ".join(f"aggregation={name}" for name in REBASES)
        return f"{combination.aggregation} can't use an update of an older adapter; use {alternatives}"
    if combination.selection == "poisson":
        return "Poisson sampling requires rounds that don't overlap; set cohort.sampling_rate to null"
    return None


def refusal_reason(combination: Combination) -> str | None:
    """Return in one line why a combination can't run, or can't be private at its level; None if it can.

    Raises:
        AntherError: a name is not registered.
    """
    for key, axis, names in (
        ("aggregation.name", AGGREGATIONS, (combination.aggregation,)),
        ("robust.rules", ROBUST_RULES, combination.robust),
        ("selection", SELECTIONS, (combination.selection,)),
        ("round_loop.mode", TIMINGS, (combination.timing,)),
        ("server_optimizer.name", OPTIMIZERS, (combination.optimizer,)),
    ):
        for name in names:
            lookup(axis, key, name)
    if reason := incompatibility(combination):
        return reason
    linearity = _declaration(AGGREGATIONS, combination.aggregation, Linearity)
    filtering = {name: _declaration(ROBUST_RULES, name, Filtering) for name in combination.robust}
    sampling = _declaration(SELECTIONS, combination.selection, Sampling)
    timing = _declaration(TIMINGS, combination.timing, TimingDeclaration)
    optimizer = _declaration(OPTIMIZERS, combination.optimizer, PostProcessing)
    if combination.level == NONE:
        return None
    undeclared = "declares no sensitivity, so the influence of one device or one picture on it is unknown"
    if linearity is None:
        return f"aggregation {combination.aggregation} {undeclared}"
    for name, declared in filtering.items():
        if declared is None:
            return f"robust rule {name} {undeclared}"
    if sampling is None:
        return f"selection {combination.selection} {undeclared}"
    if timing is None:
        return f"timing {combination.timing} {undeclared}"
    if optimizer is None:
        return f"optimizer {combination.optimizer} {undeclared}"
    if not sampling.data_independent:
        return f"selection {combination.selection} depends on private data: {sampling.reason}"
    if combination.level == EXAMPLE:
        return None  # functions of private updates are private
    if sampling.uses_transient_state:
        return f"selection {combination.selection} depends on the state of a device: {sampling.reason}"
    if not linearity.linear:
        return f"aggregation {combination.aggregation} is not linear in the updates: {linearity.reason}"
    for name, declared in filtering.items():
        if not declared.bounded:
            return f"robust rule {name} breaks the sensitivity bound: {declared.reason}"
    if not timing.prechargeable:
        return f"timing {combination.timing} can't be charged in advance: {timing.reason}"
    return None


def _declaration(axis: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return the declaration of a component; None if it has none of the kind of its axis."""
    declared = getattr(axis[name], "sensitivity", None)
    return declared if isinstance(declared, kind) else None
