"""Registries of the components on each axis of a strategy, and rules for the combinations that can be private.

Each component declares the influence of one device on it (`sensitivity`). The rules below use only these declarations:
a new component is refused under privacy until it has one, and then appears in docs/privacy.md with its reason. Secure
aggregation, and noise that is correlated over rounds, would be two more axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from common.plugins import Registry
from strategies.aggregation import AGGREGATIONS, Linearity
from strategies.declarations import conflicts_of
from strategies.robust import ROBUST_RULES, Filtering
from strategies.selection import SELECTIONS, Sampling
from strategies.server_optimizers import OPTIMIZERS, PostProcessing

NONE, EXAMPLE, DEVICE, BOTH = LEVELS = ("none", "example", "device", "both")


class TimingDeclaration(NamedTuple):
    """Sensitivity declaration of a round mode."""

    prechargeable: bool
    """Whether the participants of a round are known, and charged for, before any device is contacted."""
    reason: str


class BuiltIn(NamedTuple):
    """Component that the round loop implements itself."""

    sensitivity: TimingDeclaration | PostProcessing


TIMINGS: Registry[Any] = Registry("timing", key="round_loop.mode", modules=__name__)
TIMINGS.update(
    {
        "sync": BuiltIn(TimingDeclaration(prechargeable=True, reason="a round ends before the next begins")),
        "async": BuiltIn(
            TimingDeclaration(
                prechargeable=False,
                reason="the devices of a round, and their numbers of updates, are known only after its last update",
            )
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Names of the components on each axis; any number of robust rules, one of everything else."""

    aggregation: str
    robust: tuple[str, ...] = ()
    selection: str
    timing: str = "sync"
    optimizer: str = "none"
    level: str


AXES: Mapping[str, Registry[Any]] = {
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
    selected = [
        ("aggregation", combination.aggregation),
        *(("robust", name) for name in combination.robust),
        ("selection", combination.selection),
        ("timing", combination.timing),
    ]
    for axis, name in selected:
        for conflict in conflicts_of(AXES[axis].lookup(name)):
            for other, named in selected:
                if conflict.applies(other, named, AXES[other].lookup(named)):
                    key = "robust.rules" if other == "robust" else f"{AXES[other].key}={named}"
                    return f"{key}: {conflict.reason.format(name=named)}"
    if combination.timing == "async" and not rebases(combination.aggregation):
        alternatives = " or ".join(f"aggregation={name}" for name in AGGREGATIONS if rebases(name))
        return (
            f"round_loop.mode=async: {combination.aggregation} can't use an update of an older adapter; use "
            f"{alternatives}"
        )
    return None


def rebases(aggregation: str) -> bool:
    """Return whether an aggregation can use updates of an older adapter."""
    return getattr(AGGREGATIONS.lookup(aggregation), "rebase", None) is not None


def refusal_reason(combination: Combination) -> str | None:
    """Return in one line why a combination can't run, or can't be private at its level; None if it can.

    Raises:
        AntherError: a name is not registered.
    """
    OPTIMIZERS.lookup(combination.optimizer)
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


def _declaration(axis: Registry[Any], name: str, kind: type) -> Any:
    """Return the declaration of a component; None if it has none of the kind of its axis."""
    declared = getattr(axis.lookup(name), "sensitivity", None)
    return declared if isinstance(declared, kind) else None
