"""Aggregation rule, robust rules and server optimizer of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from common.seeding import derive_seed
from conf.plugin_options import plugin_key
from conf.schemas.federation import FederationConfig
from models.lora.adapter import Sites
from strategies.aggregation import AGGREGATIONS, Aggregation
from strategies.declarations import create
from strategies.robust import ROBUST_RULES
from strategies.robust.replay import ReplayFilter
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.server_optimizers import OPTIMIZERS, ServerOptimizer


def build_aggregation(config: FederationConfig) -> Aggregation:
    """Build the rule of `aggregation`, with those of `robust` that compare all updates of a round."""
    rule = build_rule(config)
    on_all = [name for name in config.robust if not hasattr(ROBUST_RULES.lookup(name), "check")]
    if not on_all:
        return rule
    rules = [build_robust_rule(config, name) for name in on_all]
    entrywise = rules.pop() if hasattr(rules[-1], "combine") else None
    return RobustAggregation(
        rule,
        rules=rules,
        entrywise=entrywise,
        rank=getattr(rule, "max_rank", None) if getattr(rule, "own_rank", False) else config.adapter.shared.rank,
        seed=derive_seed(config.seed, "robust"),
    )


def build_replay_filter(config: FederationConfig, sites: Sites, *, seed: int | None) -> ReplayFilter | None:
    """Build the rule of `robust` that checks each reply on arrival, if there is one.

    Args:
        config: configuration of the run.
        sites: sites of the adapter.
        seed: seed of the probes; None in a real federation, where it must be secret.
    """
    names = [name for name in config.robust if hasattr(ROBUST_RULES.lookup(name), "check")]
    known = {"sites": sites, "seed": seed}
    return cast(ReplayFilter, build_robust_rule(config, names[0], known)) if names else None


def build_rule(config: FederationConfig) -> Aggregation:
    """Build the rule of `aggregation`, without robust rules."""
    chosen = config.aggregation
    known = {"rank": config.adapter.shared.rank, "seed": derive_seed(config.seed, "aggregation")}
    return cast(Aggregation, create(AGGREGATIONS, chosen.name, chosen.options, key="aggregation", known=known))


def build_robust_rule(config: FederationConfig, name: str, known: Mapping[str, Any] | None = None) -> Any:
    """Build a rule of `robust`.

    Args:
        config: configuration of the run.
        name: name of the rule.
        known: values from elsewhere in the configuration.
    """
    return create(ROBUST_RULES, name, config.robust[name], key=f"robust.{plugin_key(name)}", known=known)


def build_server_optimizer(config: FederationConfig) -> ServerOptimizer | None:
    """Build the optimizer of `server_optimizer`; None if the mean of a round is the next adapter."""
    chosen = config.server_optimizer
    optimizer = create(OPTIMIZERS, chosen.name, chosen.options, key="server_optimizer")
    return cast(ServerOptimizer, optimizer) if hasattr(optimizer, "step") else None
