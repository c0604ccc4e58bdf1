"""Rules about combinations of settings, and of the parts of a strategy.

`strategies.registry` has the rules for combinations that can be private.
"""

from __future__ import annotations

from common.errors import AntherError
from conf.schemas.federation import FederationConfig
from protocol.messages import TrainingPlan
from strategies.aggregation import AGGREGATIONS, Aggregation, declared_linearity
from strategies.cohort import CohortRule
from strategies.download import FP32, AdapterFormat
from strategies.fedbuff import BUFFER_SIZE
from strategies.planning.planner import Planning
from strategies.registry import BOTH, DEVICE, NONE, Combination, incompatibility
from strategies.reply_checks import ReplyChecks
from strategies.robust import ROBUST_RULES
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.selection import SELECTIONS, uses_transient_state
from strategies.selection.poisson import Poisson
from strategies.server_optimizers import OPTIMIZERS
from strategies.server_update import ServerUpdate
from strategies.unused_settings import refuse_unused


class CombinationError(AntherError, ValueError):
    """Components or settings that contradict each other: a user's mistake, and a wrong argument of the strategy."""


def check_components(config: FederationConfig) -> None:
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


def check_round_loop(config: FederationConfig) -> None:
    """Refuse settings of the round loop that contradict others."""
    loop, cohort, weighting = config.round_loop, config.cohort, config.aggregation.weighting
    if loop.mode == "async" and weighting != "device":
        raise AntherError(
            f"aggregation.weighting={weighting}: an update of an older adapter has other directions, which are not "
            "slices of it; set it to device, or use round_loop.mode=sync"
        )
    if loop.mode == "async" and cohort.overselection > 1:
        raise AntherError(
            f"cohort.overselection={cohort.overselection:g}: with round_loop.mode=async no reply is too late; set "
            "it to 1"
        )
    key, limit = (
        ("round_loop.buffer_size", loop.buffer_size or BUFFER_SIZE)
        if loop.mode == "async"
        else ("cohort.size", cohort.size)
    )
    if limit is not None and loop.quorum > limit:
        raise AntherError(
            f"round_loop.quorum={loop.quorum}: no round has more replies than {key}={limit}; lower the quorum or "
            "raise it"
        )
    if config.privacy.of_devices and cohort.overselection > 1:
        raise AntherError(
            f"cohort.overselection={cohort.overselection:g}: the time of a reply would decide whether it counts, and "
            "device-level privacy charges every device that is asked; set it to 1"
        )


def check_robust(config: FederationConfig, rule: Aggregation) -> None:
    """Check `robust.rules` against the aggregation and the rest of the configuration.

    Raises:
        AntherError: a rule has no effect, or requires other settings.
    """
    settings, names = config.aggregation, config.robust.rules
    selected = Combination(aggregation=settings.name, robust=tuple(names), selection="everyone", level=NONE)
    if reason := incompatibility(selected):
        raise AntherError(reason)
    last = names[-1] if names and hasattr(ROBUST_RULES.lookup(names[-1]), "combine") else None
    if last is None:
        return
    parts = {rule.trains(number) for number in (1, 2)} - {"both"}
    if parts or config.compression.keep_fraction < 1:
        setting = f"aggregation={settings.name}" if parts else "compression.keep_fraction"
        raise AntherError(
            f"robust.rules: {last} rotates the factors, and {setting} requires stable factors; use geometric_median"
        )
    if settings.weighting != "device":
        raise AntherError(
            f"aggregation.weighting={settings.weighting}: {last} combines all updates into one, which has no slices of "
            "different devices; use aggregation.weighting=device"
        )


def check_optimizer(config: FederationConfig, rule: Aggregation) -> None:
    """Check `server_optimizer.name` against the aggregation.

    Raises:
        AntherError: the factors change their meaning between rounds.
    """
    if reason := declared_linearity(rule).rotation_reason:
        raise AntherError(
            f"server_optimizer.name={config.server_optimizer.name}: changes of factors can be summed over rounds only "
            f"if directions persist, and with {config.aggregation.name} {reason}; use aggregation=exact or "
            "aggregation=fedit, without median or trimmed_mean, or server_optimizer.name=none"
        )


def check_plan(config: FederationConfig, rule: Aggregation) -> None:
    """Check the settings of the plan against the aggregation.

    Raises:
        AntherError: settings contradict each other.
    """
    keep = config.compression.keep_fraction
    if keep < 1 and not rule.stable_factors:
        raise AntherError(
            f"compression.keep_fraction={keep}: the residual can't be used in a later round, since "
            f"{config.aggregation.name} rotates or replaces the factors; use aggregation=fedit, or set it to 1"
        )
    if config.drift_correction == "scaffold" and (reason := _scaffold_conflict(config, rule)):
        raise AntherError(f"drift_correction=scaffold: {reason}")


def _scaffold_conflict(config: FederationConfig, rule: Aggregation) -> str | None:
    """Return why SCAFFOLD can't be combined with other settings, and what to change; None if it can."""
    name = config.aggregation.name
    if not rule.stable_factors:
        return (
            f"a control variate can't be used in a later round, since {name} rotates or replaces the factors; use "
            "aggregation=fedit"
        )
    if not declared_linearity(rule).linear:
        return f"the server's control variate is a plain mean, and {name} is not; use aggregation=fedit"
    if config.adapter.shared.optimizer != "sgd":
        return (
            "only with plain SGD are a device's steps a sum of gradients; set adapter.shared.optimizer=sgd, and a "
            "higher adapter.shared.lr"
        )
    if config.privacy.of_devices:
        return (
            f"with privacy={config.privacy.level} the server's control variate would depend on updates before they "
            "are noised; use privacy=example or none"
        )
    if config.robust.rules:
        return (
            "every update enters the server's control variate, and through it all devices, even an update that "
            "robust.rules removes; use only one of both"
        )
    if config.planning.name == "device":
        return "a control variate covers every site that was sent; use planning.name=full"
    if config.round_loop.mode == "async":
        return (
            "a control variate belongs to the adapter of one round, and with round_loop.mode=async rounds overlap; use "
            "sync"
        )
    return None


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

    Raises:
        CombinationError: arguments contradict each other. Messages name the keys of the configuration.
    """
    aggregation, central_dp, lora_xs_bases = update.aggregation, update.central_dp, format.lora_xs_bases
    limits, selection, replay_filter = planning.limits, cohort.selection, checks.replay_filter
    if central_dp and update.quorum > 1:
        raise CombinationError(
            f"round_loop.quorum={update.quorum}: with device-level privacy the release does not depend on the replies, "
            "and keeping the adapter would reveal them; set it to 1"
        )
    if central_dp and replay_filter:
        raise CombinationError(f"replay_filter under device-level privacy: {replay_filter.sensitivity.reason}")
    if replay_filter and aggregation.trains(1) == "split":
        raise CombinationError("replay_filter compares products, and with this aggregation no device sends one")
    if (aggregation.trains(1) == "cores") != (lora_xs_bases is not None):
        raise CombinationError(
            "adapter.lora_xs_bases: only for aggregation=fedsb"
            if lora_xs_bases
            else "adapter.lora_xs_bases: aggregation=fedsb requires one, such as glyphs-frame"
        )
    if not 0 < plan.keep <= 1 or (plan.keep < 1 and not plan.feedback):
        raise CombinationError("keep: must be over 0 and at most 1, and less than 1 only with feedback")
    if plan.feedback and not aggregation.stable_factors:
        raise CombinationError("feedback requires an aggregation with stable factors")
    plain_mean = declared_linearity(aggregation).linear and aggregation.stable_factors
    if plan.scaffold and (central_dp or plan.optimiser != "sgd" or not plain_mean):
        raise CombinationError("scaffold requires plain SGD and a mean of factors, without device-level privacy")
    if plan.scaffold and (plan.sites is not None or planning.site_selector or limits.metered_rank is not None):
        raise CombinationError("scaffold: every device must train every site and direction")
    if format.precision != FP32 and (lora_xs_bases or plan.scaffold):
        raise CombinationError(
            f"compression.download={format.precision}: adapter.lora_xs_bases and SCAFFOLD's control variate are sent "
            "in full precision with the adapter; use compression.download=fp32"
        )
    if update.server_optimizer and declared_linearity(aggregation).rotation_reason:
        raise CombinationError(
            f"server_optimizer requires directions that persist: {declared_linearity(aggregation).rotation_reason}"
        )
    if central_dp and not declared_linearity(aggregation).linear:
        raise CombinationError(f"not linear in the updates: {declared_linearity(aggregation).reason}")
    rate = selection.rate if isinstance(selection, Poisson) else 1.0
    if central_dp and central_dp.sampling_rate != rate:
        raise CombinationError(f"accounted with a sampling rate of {central_dp.sampling_rate}, selected with {rate}")
    if limits.metered_rank is not None and not aggregation.mixed_ranks:
        raise CombinationError("limits.metered_rank: this aggregation requires equal ranks; set it to None")
    level = BOTH if plan.privacy else DEVICE
    if central_dp and limits.uses_transient_state:
        raise CombinationError(
            f"planning.max_battery_fraction={limits.battery_share}: the battery charge of a device is private with "
            f"privacy={level}; use planning.max_joules"
        )
    if central_dp and uses_transient_state(selection):
        raise CombinationError("selection uses transient device state, which is private under device-level privacy")
    if central_dp and limits.metered_update is not None:
        raise CombinationError(
            f"compression.metered_upload={limits.metered_update}: the link of a device is private with "
            f"privacy={level}; use compression.upload"
        )
    if central_dp and limits.metered_rank is not None:
        raise CombinationError("planning.metered_rank: the link of a device is private under device-level privacy")
    if limits.metered_update is not None and limits.feedback and not aggregation.stable_factors:
        raise CombinationError("feedback requires an aggregation with stable factors")
    if policy.interval and plan.privacy and not policy.local_noise:
        raise CombinationError("evaluation_policy: with example-level privacy, devices report no metric without noise")
    if policy.interval and central_dp and not policy.central_noise:
        raise CombinationError("evaluation_policy: with device-level privacy, no metric is stored without noise")
