"""Aggregation rule and server optimizer of a configuration."""

from __future__ import annotations

from typing import cast

from common.seeding import derive_seed
from conf.schemas.federation import FederationConfig
from models.lora.adapter import Sites
from strategies.aggregation import AGGREGATIONS, Aggregation
from strategies.declarations import option_values, own_options
from strategies.robust import ROBUST_RULES
from strategies.robust.replay import ReplayFilter
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.server_optimizers import OPTIMIZERS, ServerOptimizer


def build_aggregation(config: FederationConfig) -> Aggregation:
    """Build the rule of `aggregation.name`, with the rules of `robust.rules` that compare all updates of a round."""
    rule, settings, names = build_rule(config), config.aggregation, config.robust.rules
    on_all = [name for name in names if not hasattr(ROBUST_RULES.lookup(name), "check")]
    if not on_all:
        return rule
    rules = [ROBUST_RULES.create(name, option_values(ROBUST_RULES.lookup(name), config)) for name in on_all]
    entrywise = rules.pop() if hasattr(rules[-1], "combine") else None
    return RobustAggregation(
        rule,
        rules=rules,
        entrywise=entrywise,
        rank=settings.max_rank if getattr(rule, "own_rank", False) else config.adapter.shared.rank,
        seed=derive_seed(config.seed, "robust"),
    )


def build_replay_filter(config: FederationConfig, sites: Sites, *, seed: int | None) -> ReplayFilter | None:
    """Build the rule of `robust.rules` that checks each reply on arrival, if there is one.

    Args:
        config: configuration of the run.
        sites: sites of the adapter.
        seed: seed of the probes; None in a real federation, where it must be secret.
    """
    names = [name for name in config.robust.rules if hasattr(ROBUST_RULES.lookup(name), "check")]
    return cast(ReplayFilter, ROBUST_RULES.create(names[0], {"sites": sites, "seed": seed})) if names else None


def build_rule(config: FederationConfig) -> Aggregation:
    """Build the rule of `aggregation.name`, without robust rules."""
    name = config.aggregation.name
    rule = AGGREGATIONS.lookup(name)
    known = {"rank": config.adapter.shared.rank, "seed": derive_seed(config.seed, "aggregation")}
    own = own_options(rule, config.aggregation.options, key="aggregation.options", known=known)
    return cast(Aggregation, AGGREGATIONS.create(name, {**known, **option_values(rule, config), **own}))


def build_server_optimizer(config: FederationConfig) -> ServerOptimizer | None:
    """Build the optimizer of `server_optimizer.name`; None if the mean of a round is the next adapter."""
    settings = config.server_optimizer
    if settings.name == "none":
        return None
    optimizer = OPTIMIZERS.lookup(settings.name)
    own = own_options(optimizer, settings.options, key="server_optimizer.options", known=["yogi"])
    return cast(ServerOptimizer, OPTIMIZERS.create(settings.name, {**option_values(optimizer, config), **own}))
