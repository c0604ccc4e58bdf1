"""Aggregation rule and server optimizer of a configuration."""

from __future__ import annotations

from typing import cast

from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.simulation import SimulationConfig
from models.lora.adapter import Sites
from strategies.aggregation import Aggregation, declared_linearity
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


def build_aggregation(config: SimulationConfig) -> Aggregation:
    """Build the rule of `aggregation.name`, with the rules of `robust.rules` that compare all updates of a round.

    Raises:
        AntherError: settings contradict each other.
    """
    rule, settings, robust = _build_rule(config), config.aggregation, config.robust
    if robust.norm_bound is not None and "norm_bound" not in robust.rules:
        raise AntherError(
            f"robust.norm_bound={robust.norm_bound:g} requires norm_bound in robust.rules; add it, or set it to null"
        )
    conflicts = (robust_conflict(settings.name, name) for name in robust.rules)
    if reason := next((reason for reason in conflicts if reason), None):
        raise AntherError(f"robust.rules: {reason}")
    if not set(robust.rules) - {"replay"}:
        return rule
    for name in robust.rules:
        lookup(ROBUST_RULES, "robust.rules", name)
    outliers = 0.2 if robust.outlier_fraction is None else robust.outlier_fraction
    reweighting: dict[str, RobustRule] = {
        "norm_bound": NormBound(bound=robust.norm_bound, factor=robust.norm_factor or 1.0),
        "krum": MultiKrum(outliers=outliers),
        "foolsgold": FoolsGold(),
        "afa": AFA(),
        "geometric_median": GeometricMedian(),
    }
    entrywise = {"median": Median(), "trimmed_mean": TrimmedMean(outliers=outliers)}
    if unknown := [name for name in robust.rules if name not in {"replay", *reweighting, *entrywise}]:
        raise AntherError(
            f"robust.rules={unknown[0]}: registered, but strategies/factory/aggregation.py does not create it"
        )
    last = robust.rules[-1]
    parts = {rule.trains(number) for number in (1, 2)} - {"both"}
    if last in entrywise and (parts or config.compression.keep_fraction < 1):
        setting = f"aggregation={settings.name}" if parts else "compression.keep_fraction"
        raise AntherError(
            f"robust.rules: {last} rotates the factors, and {setting} requires stable factors; use geometric_median"
        )
    if last in entrywise and settings.weighting != "device":
        raise AntherError(
            f"aggregation.weighting={settings.weighting}: {last} combines all updates into one, which has no slices of "
            "different devices; use aggregation.weighting=device"
        )
    any_rank = settings.name in ("exact", "flora")
    return RobustAggregation(
        rule,
        rules=[reweighting[name] for name in robust.rules if name in reweighting],
        entrywise=entrywise.get(last),
        rank=settings.max_rank if any_rank else config.adapter.shared.rank,
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
    settings, rank, seed = config.aggregation, config.adapter.shared.rank, derive_seed(config.seed, "aggregation")
    name = settings.name
    arguments = {"rank": rank, "seed": seed}
    if name == "exact":
        exact = {
            "max_rank": settings.max_rank,
            "energy": settings.energy_fraction,
            "by_slice": settings.weighting == "rank_slice",
        }
        return cast(Aggregation, create(AGGREGATIONS, "aggregation.name", name, {**arguments, **exact}))
    if settings.weighting != "device":
        raise AntherError(f"aggregation.weighting={settings.weighting} requires aggregation=exact, not {name}")
    if settings.max_rank not in (None, rank):
        raise AntherError(
            f"aggregation.max_rank={settings.max_rank}: {name} uses adapter.shared.rank={rank}; use aggregation=exact"
        )
    if settings.energy_fraction is not None:
        raise AntherError(
            f"aggregation.energy_fraction={settings.energy_fraction}: {name} uses adapter.shared.rank; use "
            "aggregation=exact"
        )
    return cast(Aggregation, create(AGGREGATIONS, "aggregation.name", name, arguments))


def build_server_optimizer(config: SimulationConfig, rule: Aggregation) -> ServerOptimizer | None:
    """Build the optimizer of `server_optimizer.name`; None if the rule's mean is the next adapter.

    Raises:
        AntherError: a rule whose factors change their meaning between rounds, or a learning rate without an optimizer.
    """
    settings = config.server_optimizer
    if settings.name == "none":
        if settings.lr is not None:
            raise AntherError(
                f"server_optimizer.lr={settings.lr:g}: without an optimizer the mean is the next adapter; use "
                "server_optimizer.name=fedavgm, fedadam or fedyogi, or set it to null"
            )
        return None
    if reason := declared_linearity(rule).rotation_reason:
        raise AntherError(
            f"server_optimizer.name={settings.name}: changes of factors can be summed over rounds only if "
            f"directions persist, and with {config.aggregation.name} {reason}; use aggregation=exact or "
            "aggregation=fedit, without median or trimmed_mean, or server_optimizer.name=none"
        )
    momentum = 0.9 if settings.momentum is None else settings.momentum
    lookup(OPTIMIZERS, "server_optimizer.name", settings.name)
    if settings.name == "fedavgm":
        return FedAvgM(lr=settings.lr or 1.0, momentum=momentum)
    if settings.name not in ("fedadam", "fedyogi"):
        raise AntherError(
            f"server_optimizer.name={settings.name}: registered, but strategies/factory/aggregation.py does not "
            "create it"
        )
    return FedOpt(
        lr=settings.lr or 0.003,
        momentum=momentum,
        beta2=0.99 if settings.beta2 is None else settings.beta2,
        tau=settings.tau or 1e-3,
        yogi=settings.name == "fedyogi",
    )
