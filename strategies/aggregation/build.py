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
    """The rule that `aggregation.name` names, behind those of `robust.rules` that judge a whole round.

    Raises AntherError for a setting that it has not.
    """
    rule, chosen, robust = _aggregation(config), config.aggregation, config.robust
    if robust.norm_bound is not None and "norm_bound" not in robust.rules:
        raise AntherError(
            f"robust.norm_bound={robust.norm_bound:g}: nothing holds a change to it; add norm_bound to robust.rules, or "
            "leave it null"
        )
    if reason := next((said for name in robust.rules if (said := robust_conflict(chosen.name, name))), None):
        raise AntherError(f"robust.rules: {reason}")
    if not set(robust.rules) - {"replay"}:
        return rule
    for name in robust.rules:
        lookup(ROBUST_RULES, "robust.rules", name)
    outliers = 0.2 if robust.outlier_fraction is None else robust.outlier_fraction
    judging: dict[str, RobustRule] = {
        "norm_bound": NormBound(bound=robust.norm_bound, factor=robust.norm_factor or 1.0),
        "krum": MultiKrum(outliers=outliers),
        "foolsgold": FoolsGold(),
        "afa": AFA(),
        "geometric_median": GeometricMedian(),
    }
    entrywise = {"median": Median(), "trimmed_mean": TrimmedMean(outliers=outliers)}
    if unmade := [name for name in robust.rules if name not in {"replay", *judging, *entrywise}]:
        raise AntherError(
            f"robust.rules={unmade[0]}: it is registered, and strategies/aggregation/build.py doesn't make it"
        )
    last = robust.rules[-1]
    parts = {rule.trains(number) for number in (1, 2)} - {"both"}
    if last in entrywise and (parts or config.compression.keep_fraction < 1):
        given = f"aggregation={chosen.name}" if parts else "compression.keep_fraction"
        raise AntherError(
            f"robust.rules: {last} turns the factors, {given} needs them as they are; use geometric_median"
        )
    if last in entrywise and chosen.weighting != "device":
        raise AntherError(
            f"aggregation.weighting={chosen.weighting}: {last} makes one update of all, which has no slices of different "
            "devices; leave it device"
        )
    whole = chosen.name in ("exact", "flora")
    return RobustAggregation(
        rule,
        rules=[judging[name] for name in robust.rules if name in judging],
        entrywise=entrywise.get(last),
        rank=chosen.max_rank if whole else config.adapter.shared.rank,
        seed=derive_seed(config.seed, "robust"),
    )


def replay(config: SimulationConfig, rule: Aggregation, sites: Sites, *, seed: int | None) -> ReplayFilter | None:
    """What refuses replays, if `robust.rules` names it.

    Args:
        seed: of the probes; None in a real federation, where nobody is to know it.

    Raises AntherError for an aggregation of which no product is sent.
    """
    if "replay" not in config.robust.rules:
        return None
    if rule.trains(1) == "split":
        raise AntherError(
            f"robust.rules: replay compares products, and with aggregation={config.aggregation.name} every device "
            "keeps its own B; leave it out, or use aggregation=fedit"
        )
    return ReplayFilter(sites, seed=seed)


def _aggregation(config: SimulationConfig) -> Aggregation:
    """The rule that `aggregation.name` names."""
    chosen, rank, seed = config.aggregation, config.adapter.shared.rank, derive_seed(config.seed, "aggregation")
    name = chosen.name
    settings = {"rank": rank, "seed": seed}
    if name == "exact":
        own = {
            "max_rank": chosen.max_rank,
            "energy": chosen.energy_fraction,
            "by_slice": chosen.weighting == "rank_slice",
        }
        return cast(Aggregation, create(AGGREGATIONS, "aggregation.name", name, {**settings, **own}))
    if chosen.weighting != "device":
        raise AntherError(
            f"aggregation.weighting={chosen.weighting}: {name} weighs whole devices; use aggregation=exact"
        )
    if chosen.max_rank not in (None, rank):
        raise AntherError(
            f"aggregation.max_rank={chosen.max_rank}: {name} goes by adapter.shared.rank={rank}; use aggregation=exact"
        )
    if chosen.energy_fraction is not None:
        raise AntherError(
            f"aggregation.energy_fraction={chosen.energy_fraction}: {name} goes by adapter.shared.rank; use aggregation=exact"
        )
    return cast(Aggregation, create(AGGREGATIONS, "aggregation.name", name, settings))


def optimiser(config: SimulationConfig, rule: Aggregation) -> ServerOptimizer | None:
    """The server's, as `server_optimizer.name` names it; None if the rule's mean is the next adapter.

    Raises AntherError for a rule whose factors are new each round, and for a rate of no step.
    """
    chosen = config.server_optimizer
    if chosen.name == "none":
        if chosen.lr is not None:
            raise AntherError(
                f"server_optimizer.lr={chosen.lr:g}: without an optimizer the mean is the next adapter; "
                "choose server_optimizer.name=fedavgm, fedadam or fedyogi, or leave it null"
            )
        return None
    if turned := rule.sensitivity.turned:
        raise AntherError(
            f"server_optimizer.name={chosen.name}: a change of factors adds up over rounds only where they stay the "
            f"same, and of {config.aggregation.name} {turned}; use aggregation=exact or aggregation=fedit, without median or "
            "trimmed_mean, or leave it none"
        )
    momentum = 0.9 if chosen.momentum is None else chosen.momentum
    lookup(OPTIMIZERS, "server_optimizer.name", chosen.name)
    if chosen.name == "fedavgm":
        return FedAvgM(rate=chosen.lr or 1.0, momentum=momentum)
    if chosen.name not in ("fedadam", "fedyogi"):
        raise AntherError(f"server_optimizer.name={chosen.name}: it is registered, and nothing here makes it")
    return FedOpt(
        rate=chosen.lr or 0.003,
        momentum=momentum,
        second=0.99 if chosen.beta2 is None else chosen.beta2,
        tau=chosen.tau or 1e-3,
        yogi=chosen.name == "fedyogi",
    )
