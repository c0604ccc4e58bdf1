"""Combination that a configuration selects, and its check before a base is loaded."""

from __future__ import annotations

from dataclasses import replace

from common.errors import AntherError
from conf.schemas.federation import FederationConfig
from strategies.download import FP32
from strategies.factory.aggregation import build_robust_rule, build_rule, build_server_optimizer
from strategies.factory.personalization import build_personalization
from strategies.factory.selection import build_selection, selection_name
from strategies.planning import PLANNINGS
from strategies.planning.plan import PlanLimits
from strategies.registry import AGGREGATIONS, OPTIMIZERS, ROBUST_RULES, SELECTIONS, TIMINGS
from strategies.validation import check
from strategies.validation.combination import Combination, Component, named, trained_parts


def check_configuration(config: FederationConfig) -> None:
    """Check the names, the options and the combination of a configuration's components, without a base.

    Raises:
        AntherError: a name is not registered, an option is missing or refused, or settings contradict each other.
    """
    for registry, names in (
        (AGGREGATIONS, [config.aggregation.name]),
        (OPTIMIZERS, [config.server_optimizer.name]),
        (SELECTIONS, [config.selection.name]),
        (PLANNINGS, [config.planning.name]),
        (ROBUST_RULES, list(config.robust)),
    ):
        for name in names:
            registry.lookup(name)
    if key := getattr(SELECTIONS.lookup(config.selection.name), "chosen_by", None):
        raise AntherError(f"selection={config.selection.name}: set {key} instead")
    build_server_optimizer(config)
    for name in config.robust:
        build_robust_rule(config, name, {"sites": {}, "seed": 0})
    check(combination(config))


def combination(config: FederationConfig) -> Combination:
    """Return the components and settings of a configuration that can contradict each other."""
    cohort, loop, compression, privacy = config.cohort, config.round_loop, config.compression, config.privacy
    rule, scaffold = build_rule(config), config.drift_correction == "scaffold"
    chosen = Combination(
        aggregation=Component(config.aggregation.name, rule),
        trained_parts=trained_parts(rule),
        robust=tuple(named(ROBUST_RULES, name) for name in config.robust),
        selection=Component(selection_name(config), build_selection(config, seed=config.seed)),
        timing=named(TIMINGS, loop.name),
        optimizer=named(OPTIMIZERS, config.server_optimizer.name),
        personalization=Component(config.personalization.name, build_personalization(config)),
        level=privacy.level,
        local_optimizer=config.adapter.shared.optimizer,
        scaffold=scaffold,
        keep=compression.keep_fraction,
        download=compression.download,
        lora_xs_bases=config.adapter.lora_xs_bases is not None,
        every_site=PLANNINGS.lookup(config.planning.name).every_site,
        quorum=loop.quorum,
        overselection=cohort.overselection,
        cohort_size=cohort.size,
        buffer_size=loop.buffer_size,
        devices=config.data.count(),
        rounds=config.rounds,
        participations=privacy.device.max_participations,
        evaluation_interval=config.private_eval.interval,
        local_noise=privacy.of_examples,
        central_noise=privacy.of_devices,
    )
    return replace(
        chosen,
        feedback=chosen.stable_factors and compression.upload != FP32,
        limits=_limits(config, mixed_ranks=rule.mixed_ranks, feedback=chosen.stable_factors),
    )


def _limits(config: FederationConfig, *, mixed_ranks: bool, feedback: bool) -> PlanLimits:
    """Return the limits of `planning` and of `compression`.

    Args:
        config: configuration of the run.
        mixed_ranks: whether the aggregation supports mixed ranks.
        feedback: whether devices may use a quantization residual in a later round.
    """
    # A control variate covers every direction, and device-level privacy protects the link of a device.
    reducible = mixed_ranks and config.drift_correction == "none" and not config.privacy.of_devices
    return PlanLimits(
        metered_rank=config.planning.metered_rank if reducible else None,
        metered_update=config.compression.metered_upload,
        feedback=feedback,
        deadline=config.planning.deadline,
        joules=config.planning.max_joules,
        battery_share=config.planning.max_battery_fraction,
    )
