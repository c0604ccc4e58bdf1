"""Rules on combinations of settings, each in one function.

A rule returns the first reason for which it refuses a combination, in one line with the keys and the remedy, or None.
Rules read what components declare and never their names.
"""

from __future__ import annotations

from collections.abc import Callable

from strategies.aggregation import declared_linearity
from strategies.download import FP32
from strategies.planning import PLANNINGS
from strategies.registry import ROBUST_RULES
from strategies.validation.combination import Combination
from strategies.validation.personalization import personalization
from strategies.validation.privacy import refusal
from strategies.validation.wording import aggregations, listed

Rule = Callable[[Combination], str | None]


def order_of_robust_rules(chosen: Combination) -> str | None:
    """Refuse a robust rule at a position where it can't work."""
    last = len(chosen.robust) - 1
    for position, (name, rule) in enumerate(chosen.robust):
        if hasattr(rule, "check") and position > 0:
            return f"robust: {name} checks each reply on arrival, before any other rule: put it first"
        if hasattr(rule, "combine") and position < last:
            return f"robust: {name} merges all updates into one: put it last"
    return None


def entrywise_rule(chosen: Combination) -> str | None:
    """Refuse settings that a combination of all updates, entry by entry, can't keep."""
    if chosen.entrywise is None:
        return None
    name, rule = chosen.entrywise.name, chosen.aggregation.name
    if chosen.trained_parts != {"both"} or chosen.keep < 1:
        setting = "compression.keep_fraction" if chosen.keep < 1 else f"aggregation={rule}"
        whole = [known for known, one in ROBUST_RULES.items() if hasattr(one, "reweight")]
        return f"robust: {name} rotates the factors, and {setting} requires stable factors; use {listed(whole)} instead"
    if getattr(chosen.aggregation.declared, "by_slice", False):
        return (
            f"aggregation.weighting=rank_slice: {name} combines all updates into one, which has no slices of "
            "different devices; use aggregation.weighting=device"
        )
    return None


def overlapping_rounds(chosen: Combination) -> str | None:
    """Refuse settings that require rounds that don't overlap."""
    mode = f"round_loop={chosen.timing.name}"
    if not chosen.overlapping:
        return None
    if getattr(chosen.aggregation.declared, "by_slice", False):
        return (
            "aggregation.weighting=rank_slice: an update of an older adapter has other directions, which are not "
            "slices of it; set it to device, or use round_loop=sync"
        )
    if chosen.overselection > 1:
        return f"cohort.overselection={chosen.overselection:g}: with {mode} no reply is too late; set it to 1"
    return None


def quorum(chosen: Combination) -> str | None:
    """Refuse a quorum that no round reaches, or that would reveal the number of replies."""
    key, limit = "cohort.size", chosen.cohort_size
    if chosen.overlapping:
        key, limit = "round_loop.buffer_size", chosen.buffer_size
    if limit is not None and chosen.quorum > limit:
        return (
            f"round_loop.quorum={chosen.quorum}: no round has more replies than {key}={limit}; lower the quorum or "
            "raise it"
        )
    if chosen.of_devices and chosen.quorum > 1:
        return (
            f"round_loop.quorum={chosen.quorum}: with device-level privacy the release does not depend on the replies, "
            "and keeping the adapter would reveal them; set it to 1"
        )
    return None


def server_optimizer(chosen: Combination) -> str | None:
    """Refuse a server optimizer if factors change their meaning between rounds."""
    reason = chosen.linearity.rotation_reason
    if not hasattr(chosen.optimizer.declared, "step") or reason is None:
        return None
    entrywise = [name for name, rule in ROBUST_RULES.items() if hasattr(rule, "combine")]
    use = aggregations(lambda rule: declared_linearity(rule).rotation_reason is None)
    return (
        "server_optimizer: changes of factors can be summed over rounds only if directions persist, and with "
        f"{chosen.aggregation.name} {reason}; use {use}, without {listed(entrywise)}, or server_optimizer=none"
    )


def uploads(chosen: Combination) -> str | None:
    """Refuse error feedback if factors change their meaning between rounds, and a part of a change without it."""
    lost = (
        f"the residual can't be used in a later round, since {chosen.aggregation.name} rotates or replaces the factors"
    )
    use = f"use {aggregations(lambda rule: rule.stable_factors)}"
    keep, stable, limits = f"compression.keep_fraction={chosen.keep:g}", chosen.stable_factors, chosen.limits
    if not 0 < chosen.keep <= 1:
        return f"{keep}: must be over 0 and at most 1"
    if chosen.keep < 1 and not stable:
        return f"{keep}: {lost}; {use}, or set it to 1"
    if chosen.keep < 1 and not chosen.feedback:
        return f"{keep}: the blocks that are not sent would be lost; set feedback of the plan, or keep to 1"
    if chosen.feedback and not stable:
        return f"compression.upload with feedback: {lost}; {use}, or set feedback to False"
    if limits.metered_update is not None and limits.feedback and not stable:
        return (
            f"compression.metered_upload={limits.metered_update} with feedback: {lost}; {use}, or set feedback to False"
        )
    return None


def scaffold(chosen: Combination) -> str | None:
    """Refuse SCAFFOLD if a control variate has no meaning, or would reveal single updates."""
    if not chosen.scaffold or (reason := _scaffold_conflict(chosen)) is None:
        return None
    return f"drift_correction=scaffold: {reason}"


def _scaffold_conflict(chosen: Combination) -> str | None:
    name, rule, limits = chosen.aggregation.name, chosen.aggregation.declared, chosen.limits
    use = aggregations(lambda rule: rule.stable_factors and declared_linearity(rule).linear)
    if not rule.stable_factors:
        return (
            f"a control variate can't be used in a later round, since {name} rotates or replaces the factors; use {use}"
        )
    if not declared_linearity(rule).linear:
        return f"the server's control variate is a plain mean, and {name} is not; use {use}"
    if chosen.local_optimizer != "sgd":
        return (
            "only with plain SGD are a device's steps a sum of gradients; set adapter.shared.optimizer=sgd, and a "
            "higher adapter.shared.lr"
        )
    if chosen.of_devices:
        return (
            f"with privacy={chosen.level} the server's control variate would depend on updates before they are noised; "
            "use privacy=example or none"
        )
    if chosen.robust:
        return (
            "every update enters the server's control variate, and through it all devices, even an update that "
            "a robust rule removes; use only one of both"
        )
    if not chosen.every_site:
        names = [known for known, one in PLANNINGS.items() if one.every_site]
        return f"a control variate covers every site that was sent; use planning={listed(names)}"
    if limits.metered_rank is not None:
        return "a control variate covers every direction that was sent; set limits.metered_rank to None"
    if chosen.overlapping:
        return (
            f"a control variate belongs to the adapter of one round, and with round_loop={chosen.timing.name} "
            "rounds overlap; use sync"
        )
    return None


def adapter_format(chosen: Combination) -> str | None:
    """Refuse fixed factors without cores, cores without fixed factors, and quantized downloads of further tensors."""
    cores, name = "cores" in chosen.trained_parts, chosen.aggregation.name
    if chosen.lora_xs_bases and not cores:
        return f"adapter.lora_xs_bases: {name} trains no cores between fixed factors; set it to null"
    if cores and not chosen.lora_xs_bases:
        return f"adapter.lora_xs_bases: aggregation={name} requires one, such as glyphs-frame"
    if chosen.download != FP32 and (chosen.lora_xs_bases or chosen.scaffold):
        return (
            f"compression.download={chosen.download}: adapter.lora_xs_bases and SCAFFOLD's control variate are sent in "
            "full precision with the adapter; use compression.download=fp32"
        )
    return None


def limits_of_plans(chosen: Combination) -> str | None:
    """Refuse limits that the aggregation doesn't support, and under device-level privacy those that follow state."""
    limits, level = chosen.limits, chosen.level
    if limits.metered_rank is not None and not chosen.aggregation.declared.mixed_ranks:
        return (
            f"planning.metered_rank={limits.metered_rank}: {chosen.aggregation.name} requires equal ranks; set "
            "limits.metered_rank to None"
        )
    if not chosen.of_devices:
        return None
    if limits.battery_share is not None:
        return (
            f"planning.max_battery_fraction={limits.battery_share:g}: the battery charge of a device is private with "
            f"privacy={level}; use planning.max_joules"
        )
    if limits.metered_update is not None:
        return (
            f"compression.metered_upload={limits.metered_update}: the link of a device is private with "
            f"privacy={level}; use compression.upload"
        )
    if limits.metered_rank is not None:
        return (
            f"planning.metered_rank={limits.metered_rank}: the link of a device is private with privacy={level}; set "
            "limits.metered_rank to None"
        )
    return None


def accounting(chosen: Combination) -> str | None:
    """Refuse settings that contradict the accounting of device-level privacy."""
    if not chosen.of_devices:
        return None
    if chosen.overselection > 1:
        return (
            f"cohort.overselection={chosen.overselection:g}: the time of a reply would decide whether it counts, and "
            "device-level privacy charges every device that is asked; set it to 1"
        )
    rate, maximum = chosen.sampling_rate, chosen.participations
    if chosen.accounted_rate not in (None, rate):
        return (
            f"cohort.sampling_rate={rate:g}: accounted with a sampling rate of {chosen.accounted_rate:g}; use one rate "
            "for both"
        )
    key = f"privacy.device.max_participations={maximum}"
    if maximum is not None and chosen.amplifies:
        return f"{key}: with cohort.sampling_rate every device is charged for every round; set it to null"
    if chosen.devices is not None and chosen.rounds is not None and not chosen.amplifies:
        size = chosen.cohort_size or chosen.devices
        if chosen.devices * min(maximum or chosen.rounds, chosen.rounds) < size * chosen.rounds:
            return (
                f"{key}: {chosen.devices} devices are too few for {chosen.rounds} rounds of {size}; lower cohort.size "
                "or rounds, or raise it"
            )
    return None


def evaluation(chosen: Combination) -> str | None:
    """Refuse evaluations that would report or store numbers without noise, or only noise."""
    key = f"private_eval.interval={chosen.evaluation_interval}"
    if not chosen.evaluation_interval:
        return None
    if chosen.of_examples and chosen.of_devices:
        return (
            f"{key}: with privacy={chosen.level} a gain is noised on the device, and clipping it again on the server "
            "leaves only noise; set it to 0"
        )
    if chosen.of_examples and not chosen.local_noise:
        return f"{key}: with example-level privacy, devices report no metric without noise; set local_noise"
    if chosen.of_devices and not chosen.central_noise:
        return f"{key}: with device-level privacy, no metric is stored without noise; set central_noise"
    return None


RULES: tuple[Rule, ...] = (
    order_of_robust_rules,
    refusal,
    overlapping_rounds,
    quorum,
    entrywise_rule,
    server_optimizer,
    uploads,
    scaffold,
    adapter_format,
    limits_of_plans,
    accounting,
    evaluation,
    personalization,
)
"""All rules; the first reason is reported."""
