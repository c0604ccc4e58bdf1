"""Aggregation rule and server optimizer of a configuration."""

from __future__ import annotations

from typing import cast

from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.simulation import SimulationConfig
from models.lora.adapter import Sites
from strategies.aggregation import AGGREGATIONS, Aggregation, declared_linearity
from strategies.declarations import option_values, own_options
from strategies.registry import NONE, Combination, incompatibility
from strategies.robust import ROBUST_RULES
from strategies.robust.replay import ReplayFilter
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.server_optimizers import OPTIMIZERS, ServerOptimizer


def build_aggregation(config: SimulationConfig) -> Aggregation:
    """Build the rule of `aggregation.name`, with the rules of `robust.rules` that compare all updates of a round.

    Raises:
        AntherError: settings contradict each other.
    """
    rule, settings, names = _build_rule(config), config.aggregation, config.robust.rules
    selected = Combination(aggregation=settings.name, robust=tuple(names), selection="everyone", level=NONE)
    if reason := incompatibility(selected):
        raise AntherError(reason)
    on_all = [name for name in names if not hasattr(ROBUST_RULES.lookup(name), "check")]
    if not on_all:
        return rule
    rules = [ROBUST_RULES.create(name, option_values(ROBUST_RULES.lookup(name), config)) for name in on_all]
    last, entrywise = on_all[-1], rules.pop() if hasattr(rules[-1], "combine") else None
    parts = {rule.trains(number) for number in (1, 2)} - {"both"}
    if entrywise and (parts or config.compression.keep_fraction < 1):
        setting = f"aggregation={settings.name}" if parts else "compression.keep_fraction"
        raise AntherError(
            f"robust.rules: {last} rotates the factors, and {setting} requires stable factors; use geometric_median"
        )
    if entrywise and settings.weighting != "device":
        raise AntherError(
            f"aggregation.weighting={settings.weighting}: {last} combines all updates into one, which has no slices of "
            "different devices; use aggregation.weighting=device"
        )
    return RobustAggregation(
        rule,
        rules=rules,
        entrywise=entrywise,
        rank=settings.max_rank if getattr(rule, "own_rank", False) else config.adapter.shared.rank,
        seed=derive_seed(config.seed, "robust"),
    )


def build_replay_filter(
    config: SimulationConfig, rule: Aggregation, sites: Sites, *, seed: int | None
) -> ReplayFilter | None:
    """Build the replay filter if `robust.rules` names it.

    Args:
        config: configuration of the run.
        rule: aggregation of the run.
        sites: sites of the adapter.
        seed: seed of the probes; None in a real federation, where it must be secret.

    Raises:
        AntherError: an aggregation under which no device sends a product.
    """
    if "replay" not in config.robust.rules:
        return None
    if rule.trains(1) == "split":
        raise AntherError(
            f"robust.rules: replay compares products, and with aggregation={config.aggregation.name} every device "
            "keeps its own B; remove it, or use aggregation=fedit"
        )
    return ReplayFilter(sites, seed=seed)


def _build_rule(config: SimulationConfig) -> Aggregation:
    """Build the rule of `aggregation.name`, without robust rules."""
    name = config.aggregation.name
    rule = AGGREGATIONS.lookup(name)
    known = {"rank": config.adapter.shared.rank, "seed": derive_seed(config.seed, "aggregation")}
    own = own_options(rule, config.aggregation.options, key="aggregation.options", known=known)
    return cast(Aggregation, AGGREGATIONS.create(name, {**known, **option_values(rule, config), **own}))


def build_server_optimizer(config: SimulationConfig, rule: Aggregation) -> ServerOptimizer | None:
    """Build the optimizer of `server_optimizer.name`; None if the rule's mean is the next adapter.

    Raises:
        AntherError: a rule whose factors change their meaning between rounds.
    """
    settings = config.server_optimizer
    if settings.name == "none":
        return None
    if reason := declared_linearity(rule).rotation_reason:
        raise AntherError(
            f"server_optimizer.name={settings.name}: changes of factors can be summed over rounds only if "
            f"directions persist, and with {config.aggregation.name} {reason}; use aggregation=exact or "
            "aggregation=fedit, without median or trimmed_mean, or server_optimizer.name=none"
        )
    optimizer = OPTIMIZERS.lookup(settings.name)
    own = own_options(optimizer, settings.options, key="server_optimizer.options", known=["yogi"])
    return cast(ServerOptimizer, OPTIMIZERS.create(settings.name, {**option_values(optimizer, config), **own}))
