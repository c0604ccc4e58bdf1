"""The rule of aggregation and the server's optimiser that a configuration names."""

from __future__ import annotations

from typing import cast

from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.simulation import SimulationConfig
from models.lora.adapter import Sites
from strategies.aggregation import Aggregation
from strategies.registry import AGGREGATIONS, OPTIMIZERS, ROBUST_RULES, create, lookup, robust_conflict
from strategies.robust import RobustRule
from strategies.robust.afa import AFA
from strategies.robust.foolsgold import FoolsGold
from strategies.robust.geometric import GeometricMedian
from strategies.robust.krum import MultiKrum
from strategies.robust.norm import NormBound
from strategies.robust.replay import ReplayFilter
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.robust.trimmed import Median, TrimmedMean
from strategies.server_optimizers import FedAvgM, FedOpt, ServerOptimizer


def aggregation(config: SimulationConfig) -> Aggregation:
    """The rule that `strategy.aggregation` names, behind those of `strategy.robust` that judge a whole round.

    Raises AntherError for a setting that it has not.
    """
    rule, chosen = _aggregation(config), config.strategy
    if chosen.norm_bound is not None and "norm" not in chosen.robust:
        raise AntherError(
            f"strategy.norm_bound={chosen.norm_bound:g}: nothing holds a change to it; add norm to strategy.robust, or "
            "leave it null"
        )
    if reason := next((said for name in chosen.robust if (said := robust_conflict(chosen.aggregation, name))), None):
        raise AntherError(f"strategy.robust: {reason}")
    if not set(chosen.robust) - {"replay"}:
        return rule
    for name in chosen.robust:
        lookup(ROBUST_RULES, "strategy.robust", name)
    outliers = 0.2 if chosen.outliers is None else chosen.outliers
    judging: dict[str, RobustRule] = {
        "norm": NormBound(bound=chosen.norm_bound, factor=chosen.norm_factor or 1.0),
        "krum": MultiKrum(outliers=outliers),
        "foolsgold": FoolsGold(),
        "afa": AFA(),
        "geometric": GeometricMedian(),
    }
    entrywise = {"median": Median(), "trimmed": TrimmedMean(outliers=outliers)}
    if unmade := [name for name in chosen.robust if name not in {"replay", *judging, *entrywise}]:
        raise AntherError(
            f"strategy.robust={unmade[0]}: it is registered, and strategies/aggregation/build.py doesn't make it"
        )
    last = chosen.robust[-1]
    parts = {rule.trains(number) for number in (1, 2)} - {"both"}
    if last in entrywise and (parts or chosen.keep < 1):
        given = f"strategy={chosen.aggregation}" if parts else "strategy.keep"
        raise AntherError(f"strategy.robust: {last} turns the factors, {given} needs them as they are; use geometric")
    if last in entrywise and chosen.weights != "device":
        raise AntherError(
            f"strategy.weights={chosen.weights}: {last} makes one update of all, which has no slices of different "
            "devices; leave it device"
        )
    whole = chosen.aggregation in ("exact", "flora")
    return RobustAggregation(
        rule,
        rules=[judging[name] for name in chosen.robust if name in judging],
        entrywise=entrywise.get(last),
        rank=chosen.max_rank if whole else config.adapter.shared.rank,
        seed=derive_seed(config.seed, "robust"),
    )


def replay(config: SimulationConfig, rule: Aggregation, sites: Sites, *, seed: int | None) -> ReplayFilter | None:
    """What refuses replays, if `strategy.robust` names it.

    Args:
        seed: of the probes; None in a real federation, where nobody is to know it.

    Raises AntherError for an aggregation of which no product is sent.
    """
    if "replay" not in config.strategy.robust:
        return None
    if rule.trains(1) == "split":
        raise AntherError(
            f"strategy.robust: replay compares products, and with strategy={config.strategy.aggregation} every device "
            "keeps its own B; leave it out, or use strategy=fedit"
        )
    return ReplayFilter(sites, seed=seed)


def _aggregation(config: SimulationConfig) -> Aggregation:
    """The rule that `strategy.aggregation` names."""
    chosen, rank, seed = config.strategy, config.adapter.shared.rank, derive_seed(config.seed, "aggregation")
    name = chosen.aggregation
    settings = {"rank": rank, "seed": seed}
    if name == "exact":
        own = {"max_rank": chosen.max_rank, "energy": chosen.energy, "by_slice": chosen.weights == "rank_slice"}
        return cast(Aggregation, create(AGGREGATIONS, "strategy.aggregation", name, {**settings, **own}))
    if chosen.weights != "device":
        raise AntherError(f"strategy.weights={chosen.weights}: {name} weighs whole devices; use strategy=exact")
    if chosen.max_rank not in (None, rank):
        raise AntherError(
            f"strategy.max_rank={chosen.max_rank}: {name} goes by adapter.shared.rank={rank}; use strategy=exact"
        )
    if chosen.energy is not None:
        raise AntherError(f"strategy.energy={chosen.energy}: {name} goes by adapter.shared.rank; use strategy=exact")
    return cast(Aggregation, create(AGGREGATIONS, "strategy.aggregation", name, settings))


def optimiser(config: SimulationConfig, rule: Aggregation) -> ServerOptimizer | None:
    """The server's, as `strategy.optimiser` names it; None if the rule's mean is the next adapter.

    Raises AntherError for a rule whose factors are new each round, and for a rate of no step.
    """
    chosen = config.strategy
    if chosen.optimiser == "none":
        if chosen.server_rate is not None:
            raise AntherError(
                f"strategy.server_rate={chosen.server_rate:g}: without an optimiser the mean is the next adapter; "
                "choose strategy.optimiser=fedavgm, fedadam or fedyogi, or leave it null"
            )
        return None
    if turned := rule.sensitivity.turned:
        raise AntherError(
            f"strategy.optimiser={chosen.optimiser}: a change of factors adds up over rounds only where they stay the "
            f"same, and of {chosen.aggregation} {turned}; use strategy=exact or strategy=fedit, without median or "
            "trimmed, or leave it none"
        )
    momentum = 0.9 if chosen.momentum is None else chosen.momentum
    lookup(OPTIMIZERS, "strategy.optimiser", chosen.optimiser)
    if chosen.optimiser == "fedavgm":
        return FedAvgM(rate=chosen.server_rate or 1.0, momentum=momentum)
    if chosen.optimiser not in ("fedadam", "fedyogi"):
        raise AntherError(f"strategy.optimiser={chosen.optimiser}: it is registered, and nothing here makes it")
    return FedOpt(
        rate=chosen.server_rate or 0.003,
        momentum=momentum,
        second=0.99 if chosen.second_moment is None else chosen.second_moment,
        tau=chosen.tau or 1e-3,
        yogi=chosen.optimiser == "fedyogi",
    )
