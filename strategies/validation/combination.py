"""Combination of the components and settings of a strategy, as far as rules on combinations need them.

It is made from a configuration (`strategies.factory.combination`) and from the arguments of
`strategies.strategy.FederatedStrategy` (`of_parts`), and checked by the same rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from common.plugins import Registry
from protocol.messages import TrainingPlan
from strategies.aggregation import Aggregation, Linearity, declared_linearity
from strategies.cohort import CohortRule
from strategies.download import FP32, AdapterFormat
from strategies.last_round import LastRound
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planning
from strategies.registry import AGGREGATIONS, AXES, OPTIMIZERS, ROBUST_RULES, SELECTIONS, SYNC, TIMINGS
from strategies.reply_checks import ReplyChecks
from strategies.robust.robust_aggregation import ROTATED, RobustAggregation
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.selection import amplifies
from strategies.server_optimizers import NoOptimizer
from strategies.server_update import ServerUpdate
from training.personalization import PERSONALIZATIONS, Personalization

NONE, EXAMPLE, DEVICE, BOTH = LEVELS = ("none", "example", "device", "both")


class Component(NamedTuple):
    """Component of one axis."""

    name: str
    declared: Any
    """The component or its class, whose declarations rules read."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Components of each axis, and the settings that can contradict them. Defaults contradict nothing."""

    aggregation: Component
    trained_parts: frozenset[str] = frozenset({"both"})
    """Parts of the adapter that devices train in some round (`models.lora.trainable.TRAINED_TENSORS`)."""
    robust: tuple[Component, ...] = ()
    """Robust rules in their order."""
    selection: Component
    timing: Component = field(default_factory=lambda: named(TIMINGS, SYNC))
    optimizer: Component = field(default_factory=lambda: named(OPTIMIZERS, "none"))
    """Server optimizer."""
    personalization: Component = field(default_factory=lambda: Component("lora", Personalization))
    """Method that makes personal adapters."""
    level: str = NONE
    """Level of privacy, one of `LEVELS`."""
    local_optimizer: str = "adamw"
    """Optimizer on devices."""
    scaffold: bool = False
    """Whether devices correct gradients by SCAFFOLD's control variates."""
    keep: float = 1.0
    """Fraction of a quantized change that is sent."""
    feedback: bool = False
    """Whether devices add the quantization error of a round to the change of the next one."""
    download: str = FP32
    """Precision of downloads."""
    lora_xs_bases: bool = False
    """Whether the adapter has fixed factors around trained cores."""
    every_site: bool = True
    """Whether each device trains every site that was sent."""
    limits: PlanLimits = field(default_factory=PlanLimits)
    """Limits that plans are reduced to."""
    quorum: int = 1
    """Accepted replies that a round needs."""
    overselection: float = 1.0
    """Factor on the number of devices that are asked."""
    cohort_size: int | None = None
    """Devices of a round; None: all."""
    buffer_size: int | None = None
    """Updates of an overlapping round; None: not known."""
    devices: int | None = None
    """Expected devices of the federation; None: not known."""
    rounds: int | None = None
    """Rounds of the run; None: not known."""
    participations: int | None = None
    """Rounds of one device that device-level privacy is solved for; None: all."""
    accounted_rate: float | None = None
    """Sampling rate that device-level privacy is accounted with; None: that of the selection."""
    evaluation_interval: int = 0
    """Rounds between evaluations on devices; 0: none."""
    local_noise: bool = False
    """Whether devices noise the results of evaluations."""
    central_noise: bool = False
    """Whether the server noises them."""

    @property
    def of_examples(self) -> bool:
        """Whether the run has example-level privacy."""
        return self.level in (EXAMPLE, BOTH)

    @property
    def of_devices(self) -> bool:
        """Whether the run has device-level privacy."""
        return self.level in (DEVICE, BOTH)

    @property
    def overlapping(self) -> bool:
        """Whether rounds overlap."""
        return bool(getattr(self.timing.declared, "overlapping", False))

    @property
    def entrywise(self) -> Component | None:
        """Robust rule that combines all updates into one; None: each update is aggregated."""
        return self.robust[-1] if self.robust and hasattr(self.robust[-1].declared, "combine") else None

    @property
    def linearity(self) -> Linearity:
        """Declaration of the aggregation after the robust rules."""
        return ROTATED if self.entrywise else declared_linearity(self.aggregation.declared)

    @property
    def stable_factors(self) -> bool:
        """Whether the trained tensors keep their meaning in the next round."""
        return self.entrywise is None and self.aggregation.declared.stable_factors

    @property
    def amplifies(self) -> bool:
        """Whether the selection is a secret sample that amplifies privacy."""
        return amplifies(self.selection.declared)

    @property
    def sampling_rate(self) -> float:
        """Rate of a secret sample; 1 for every other selection."""
        return float(getattr(self.selection.declared, "rate", 1.0)) if self.amplifies else 1.0


def named(axis: Registry[Any], name: str) -> Component:
    """Look up a component; AntherError if none is registered under this name."""
    return Component(name, axis.lookup(name))


def of_parts(
    plan: TrainingPlan,
    format: AdapterFormat,
    update: ServerUpdate,
    cohort: CohortRule,
    planning: Planning,
    policy: EvaluationPolicy,
    checks: ReplyChecks,
) -> Combination:
    """Return the combination of the arguments of `strategies.strategy.FederatedStrategy`, which documents them."""
    rule, central_dp = update.aggregation, update.central_dp
    method = None if plan.personalization is None else named(PERSONALIZATIONS, plan.personalization.name)
    if isinstance(rule, LastRound):
        method = _component(PERSONALIZATIONS, rule.method)
        rule = rule.aggregation
    robust: list[object] = [] if checks.replay_filter is None else [checks.replay_filter]
    if isinstance(rule, RobustAggregation):
        robust += [*rule.rules, *([] if rule.entrywise is None else [rule.entrywise])]
        rule = rule.aggregation
    return Combination(
        aggregation=_component(AGGREGATIONS, rule),
        trained_parts=trained_parts(rule),
        robust=tuple(_component(ROBUST_RULES, one) for one in robust),
        selection=_component(SELECTIONS, cohort.selection),
        optimizer=_component(OPTIMIZERS, update.server_optimizer or NoOptimizer()),
        personalization=method or Component("lora", Personalization),
        level=_level(of_examples=plan.privacy is not None, of_devices=central_dp is not None),
        local_optimizer=plan.optimiser,
        scaffold=plan.scaffold,
        keep=plan.keep,
        feedback=plan.feedback,
        download=format.precision,
        lora_xs_bases=format.lora_xs_bases is not None,
        every_site=plan.sites is None and planning.method.every_site,
        limits=planning.limits,
        quorum=update.quorum,
        participations=central_dp.budget.participations if central_dp else None,
        accounted_rate=central_dp.sampling_rate if central_dp else None,
        evaluation_interval=policy.interval,
        local_noise=policy.local_noise is not None,
        central_noise=policy.central_noise is not None,
    )


def trained_parts(rule: Aggregation) -> frozenset[str]:
    """Return the parts of the adapter that devices train in odd and even rounds."""
    return frozenset(map(rule.trains, (1, 2)))


def _component(axis: Registry[Any], component: object) -> Component:
    """Return a component with the name that its class is registered under; without one, with that of the class."""
    kind = type(component)
    return Component(next((name for name, one in axis.items() if one is kind), kind.__name__), component)


def _level(*, of_examples: bool, of_devices: bool) -> str:
    if of_examples:
        return BOTH if of_devices else EXAMPLE
    return DEVICE if of_devices else NONE


def baseline(*, level: str) -> Combination:
    """Return a combination that is private at every level, so that a refusal with one other component is due to it."""
    return Combination(aggregation=named(AGGREGATIONS, "fedit"), selection=named(SELECTIONS, "everyone"), level=level)


def combination_with(axis: str, name: str, *, level: str) -> Combination:
    """Return the baseline with one component replaced.

    Args:
        axis: axis of the component.
        name: name of the component.
        level: level of privacy.
    """
    component = named({**AXES, "optimizer": OPTIMIZERS}[axis], name)
    changes: dict[str, Any] = {axis: (component,) if axis == "robust" else component}
    return replace(baseline(level=level), **changes)


def combinations() -> Iterator[Combination]:
    """Yield every combination with at most one robust rule.

    Server optimizers are left out: they refuse nothing that another component does not.
    """
    rules = [(), *((Component(name, rule),) for name, rule in ROBUST_RULES.items())]
    axes = ([Component(*item) for item in axis.items()] for axis in (AGGREGATIONS, SELECTIONS, TIMINGS))
    for (aggregation, selection, timing), robust, level in itertools.product(itertools.product(*axes), rules, LEVELS):
        yield Combination(aggregation=aggregation, robust=robust, selection=selection, timing=timing, level=level)
