"""Which combinations of components can run, and can be private, by the declarations of the components.

docs/privacy.md is generated from these rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from strategies.aggregation import Linearity
from strategies.declarations import conflicts_of
from strategies.registry import AGGREGATIONS, AXES, TimingDeclaration
from strategies.robust import Filtering
from strategies.selection import Sampling
from strategies.server_optimizers import PostProcessing
from strategies.validation.combination import EXAMPLE, NONE, Combination, Component


def incompatibility(combination: Combination) -> str | None:
    """Return why a combination can't run at any privacy level; None if it can."""
    aggregation, timing = combination.aggregation, combination.timing
    chosen = [("aggregation", aggregation), *(("robust", rule) for rule in combination.robust)]
    chosen += [("selection", combination.selection), ("timing", timing)]
    for _, component in chosen:
        for conflict in conflicts_of(component.declared):
            for axis, other in chosen:
                if conflict.applies(axis, other.declared):
                    key = "robust" if axis == "robust" else f"{AXES[axis].key}={other.name}"
                    return f"{key}: {conflict.reason.format(name=other.name)}"
    if combination.robust and "split" in combination.trained_parts:
        return (
            f"robust: {combination.robust[0].name} compares products, and with aggregation={aggregation.name} "
            "every device keeps its own B, so there is none; remove it, or use an aggregation of both factors"
        )
    if combination.overlapping and combination.amplifies:
        return (
            f"round_loop={timing.name}: a sample that amplifies privacy requires rounds that don't overlap; set "
            "cohort.sampling_rate to null"
        )
    if combination.overlapping and not _rebases(aggregation.declared):
        names = [name for name, rule in AGGREGATIONS.items() if _rebases(rule)]
        return (
            f"round_loop={timing.name}: {aggregation.name} can't use an update of an older adapter; use "
            f"aggregation={' or '.join(names)}"
        )
    return None


def refusal_reason(combination: Combination) -> str | None:
    """Return in one line why a combination can't run, or can't be private at its level; None if it can."""
    if reason := incompatibility(combination):
        return reason
    if combination.level == NONE:
        return None
    for kind, component, declaration in (
        ("aggregation", combination.aggregation, Linearity),
        *(("robust rule", rule, Filtering) for rule in combination.robust),
        ("selection", combination.selection, Sampling),
        ("timing", combination.timing, TimingDeclaration),
        ("optimizer", combination.optimizer, PostProcessing),
    ):
        if not isinstance(_sensitivity(component), declaration):
            return (
                f"{kind} {component.name} declares no sensitivity, so the influence of one device or one picture on it "
                "is unknown"
            )
    sampling, selection = _sensitivity(combination.selection), combination.selection.name
    if not sampling.data_independent:
        return f"selection {selection} depends on private data: {sampling.reason}"
    if combination.level == EXAMPLE:
        return None  # functions of private updates are private
    if sampling.uses_transient_state:
        return f"selection {selection} depends on the state of a device: {sampling.reason}"
    if not (linearity := _sensitivity(combination.aggregation)).linear:
        return f"aggregation {combination.aggregation.name} is not linear in the updates: {linearity.reason}"
    for rule in combination.robust:
        if not (filtering := _sensitivity(rule)).bounded:
            return f"robust rule {rule.name} breaks the sensitivity bound: {filtering.reason}"
    if not (timing := _sensitivity(combination.timing)).prechargeable:
        return f"timing {combination.timing.name} can't be charged in advance: {timing.reason}"
    return None


def refusal(combination: Combination) -> str | None:
    """Return `refusal_reason` with the key and the remedy."""
    reason = refusal_reason(combination)
    if reason is None or reason == incompatibility(combination):
        return reason
    names = [
        name
        for name, rule in AGGREGATIONS.items()
        if refusal_reason(replace(combination, aggregation=Component(name, rule))) is None
    ]
    advice = f"use aggregation={' or '.join(names)}" if names else "use privacy=none"
    return f"privacy={combination.level}: {reason}; {advice} (docs/privacy.md)"


def _rebases(rule: object) -> bool:
    """Return whether an aggregation can use updates of an older adapter."""
    return getattr(rule, "rebase", None) is not None


def _sensitivity(component: Component) -> Any:
    return getattr(component.declared, "sensitivity", None)
