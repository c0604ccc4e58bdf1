"""Check that a configuration names known components, and that the parts of a strategy are consistent."""

from __future__ import annotations

from common.errors import AntherError
from conf.schemas.simulation import SimulationConfig
from protocol.messages import TrainingPlan
from strategies.aggregation import AGGREGATIONS, declared_linearity
from strategies.cohort import CohortRule
from strategies.download import FP32, AdapterFormat
from strategies.planning.planner import Planning
from strategies.reply_checks import ReplyChecks
from strategies.robust import ROBUST_RULES
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.selection import SELECTIONS, uses_transient_state
from strategies.selection.poisson import Poisson
from strategies.server_optimizers import OPTIMIZERS
from strategies.server_update import ServerUpdate
from strategies.unused_settings import refuse_unused


def check_components(config: SimulationConfig) -> None:
    """Check the names and the options of a configuration's components, without a base.

    Raises:
        AntherError: a name is not registered, a robust rule has the wrong position, or an option has no effect.
    """
    AGGREGATIONS.lookup(config.aggregation.name)
    OPTIMIZERS.lookup(config.server_optimizer.name)
    if key := getattr(SELECTIONS.lookup(config.selection.name), "chosen_by", None):
        raise AntherError(f"selection={config.selection.name}: set {key} instead")
    last = len(config.robust.rules) - 1
    for position, name in enumerate(config.robust.rules):
        rule = ROBUST_RULES.lookup(name)
        if hasattr(rule, "check") and position > 0:
            raise AntherError(f"robust.rules: {name} checks each reply on arrival, before any other rule: put it first")
        if hasattr(rule, "combine") and position < last:
            raise AntherError(f"robust.rules: {name} merges all updates into one: put it last")
    refuse_unused(config)


def check_combination(
    plan: TrainingPlan,
    format: AdapterFormat,
    update: ServerUpdate,
    cohort: CohortRule,
    planning: Planning,
    policy: EvaluationPolicy,
    checks: ReplyChecks,
) -> None:
    """Check the arguments of `strategies.strategy.FederatedStrategy`, which documents them.

    This is the last check. A configured run is checked earlier, with messages that name its keys
    (`strategies.factory.strategy`).

    Raises:
        ValueError: arguments contradict each other.
    """
    aggregation, central_dp, lora_xs_bases = update.aggregation, update.central_dp, format.lora_xs_bases
    limits, selection, replay_filter = planning.limits, cohort.selection, checks.replay_filter
    if central_dp and update.quorum > 1:
        raise ValueError("quorum: with device-level privacy a release does not depend on the replies; set it to 1")
    if central_dp and replay_filter:
        raise ValueError(f"replay_filter under device-level privacy: {replay_filter.sensitivity.reason}")
    if replay_filter and aggregation.trains(1) == "split":
        raise ValueError("replay_filter compares products, and with this aggregation no device sends one")
    if (aggregation.trains(1) == "cores") != (lora_xs_bases is not None):
        raise ValueError("lora_xs_bases: required for an aggregation of cores, and only for it")
    if not 0 < plan.keep <= 1 or (plan.keep < 1 and not plan.feedback):
        raise ValueError("keep: must be over 0 and at most 1, and less than 1 only with feedback")
    if plan.feedback and not aggregation.stable_factors:
        raise ValueError("feedback requires an aggregation with stable factors")
    plain_mean = declared_linearity(aggregation).linear and aggregation.stable_factors
    if plan.scaffold and (central_dp or plan.optimiser != "sgd" or not plain_mean):
        raise ValueError("scaffold requires plain SGD and a mean of factors, without device-level privacy")
    if plan.scaffold and (plan.sites is not None or planning.site_selector or limits.metered_rank is not None):
        raise ValueError("scaffold: every device must train every site and direction")
    if format.precision != FP32 and (lora_xs_bases or plan.scaffold):
        raise ValueError("format.precision: lora_xs_bases and scaffold require fp32")
    if update.server_optimizer and declared_linearity(aggregation).rotation_reason:
        raise ValueError(
            f"server_optimizer requires directions that persist: {declared_linearity(aggregation).rotation_reason}"
        )
    if central_dp and not declared_linearity(aggregation).linear:
        raise ValueError(f"not linear in the updates: {declared_linearity(aggregation).reason}")
    rate = selection.rate if isinstance(selection, Poisson) else 1.0
    if central_dp and central_dp.sampling_rate != rate:
        raise ValueError(f"accounted with a sampling rate of {central_dp.sampling_rate}, selected with {rate}")
    if limits.metered_rank is not None and not aggregation.mixed_ranks:
        raise ValueError("limits.metered_rank: this aggregation requires equal ranks; set it to None")
    if central_dp and (uses_transient_state(selection) or limits.uses_transient_state):
        raise ValueError("selection or limits use transient device state, which device-level privacy protects")
    if central_dp and (limits.metered_rank is not None or limits.metered_update is not None):
        raise ValueError("limits: the link of a device is private under device-level privacy; set metered_… to None")
    if limits.metered_update is not None and limits.feedback and not aggregation.stable_factors:
        raise ValueError("feedback requires an aggregation with stable factors")
    if policy.interval and plan.privacy and not policy.local_noise:
        raise ValueError("evaluation_policy: with example-level privacy, devices report no metric without noise")
    if policy.interval and central_dp and not policy.central_noise:
        raise ValueError("evaluation_policy: with device-level privacy, no metric is stored without noise")
