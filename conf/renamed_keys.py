"""Former names of configuration keys, group options and values: the one table, by application.

`conf.renames` refuses them where a person writes them, and translates them where a store holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Renamed(NamedTuple):
    """Renamed key or group of options."""

    old: str
    """`[]` stands for any element of a list; a name that ends with a dot for every key of a group."""
    new: str
    values: Mapping[str, Any] = {}
    """Renamed values, by former value."""


SIMULATION_GROUPS: tuple[Renamed, ...] = (
    Renamed("strategy", "aggregation"),
    Renamed(
        "selection",
        "selection",
        {"sample": "random", "energy": "eafl", "loss_fair": "power_of_choice", "thrifty": "energy_delay"},
    ),
)
"""Groups of options, and options, of simulations and servers."""
SIMULATION: tuple[Renamed, ...] = (
    Renamed("strategy.aggregation", "aggregation.name"),
    Renamed("strategy.max_rank", "aggregation.max_rank"),
    Renamed("strategy.energy", "aggregation.energy_fraction"),
    Renamed("strategy.weights", "aggregation.weighting"),
    Renamed("strategy.planning", "planning.name"),
    Renamed("strategy.deadline", "planning.deadline"),
    Renamed("strategy.joules", "planning.max_joules"),
    Renamed("strategy.battery_share", "planning.max_battery_fraction"),
    Renamed("strategy.metered_rank", "planning.metered_rank"),
    Renamed("strategy.update", "compression.upload"),
    Renamed("strategy.metered_update", "compression.metered_upload"),
    Renamed("strategy.download", "compression.download"),
    Renamed("strategy.keep", "compression.keep_fraction"),
    Renamed("strategy.correction", "drift_correction"),
    Renamed("strategy.optimiser", "server_optimizer.name"),
    Renamed("strategy.server_rate", "server_optimizer.lr"),
    Renamed("strategy.momentum", "server_optimizer.momentum"),
    Renamed("strategy.second_moment", "server_optimizer.beta2"),
    Renamed("strategy.tau", "server_optimizer.tau"),
    Renamed(
        "strategy.robust",
        "robust.rules",
        {"norm": "norm_bound", "geometric": "geometric_median", "trimmed": "trimmed_mean"},
    ),
    Renamed("strategy.outliers", "robust.outlier_fraction"),
    Renamed("strategy.norm_bound", "robust.norm_bound"),
    Renamed("strategy.norm_factor", "robust.norm_factor"),
    Renamed("strategy.timing", "round_loop.mode"),
    Renamed("strategy.buffer", "round_loop.buffer_size"),
    Renamed("strategy.quorum", "round_loop.quorum"),
    Renamed("strategy.timeout", "round_loop.timeout"),
    Renamed("fleet.concurrency", "round_loop.concurrency"),
    Renamed("fleet.sample", "cohort.size"),
    Renamed("fleet.rate", "cohort.sampling_rate"),
    Renamed("fleet.evaluate", "cohort.eval_size"),
    Renamed("fleet.overselect", "cohort.overselection"),
    Renamed("fleet.report_age", "cohort.max_state_age"),
    Renamed("fleet.eligible.idle", "cohort.eligibility.idle"),
    Renamed("fleet.eligible.battery", "cohort.eligibility.min_battery"),
    Renamed("fleet.eligible.cool", "cohort.eligibility.cool"),
    Renamed("fleet.eligible.unmetered", "cohort.eligibility.unmetered"),
    Renamed("fleet.eligible.memory_gib", "cohort.eligibility.min_memory_gib"),
    Renamed("fleet.eligible.pictures", "cohort.eligibility.has_pictures"),
    Renamed("fleet.zones", "fleet.timezone_spread"),
    Renamed("fleet.jitter", "fleet.schedule_jitter"),
    Renamed("fleet.workload.memory", "fleet.workload.memory_factor"),
    Renamed("fleet.workload.arithmetic", "fleet.workload.compute_factor"),
    Renamed("fleet.profiles[].share", "fleet.profiles[].count"),
    Renamed("fleet.profiles[].rank", "fleet.profiles[].max_rank"),
    Renamed("fleet.profiles[].plugged", "fleet.profiles[].plugged_hours"),
    Renamed("fleet.profiles[].idle", "fleet.profiles[].idle_hours"),
    Renamed("fleet.profiles[].leaves", "fleet.profiles[].interruptible"),
    Renamed("fleet.profiles[].drop_out", "fleet.profiles[].dropout_per_hour"),
    Renamed("fleet.profiles[].hot_after", "fleet.profiles[].throttle_after"),
    Renamed("fleet.profiles[].cool_after", "fleet.profiles[].cooldown"),
    Renamed("fleet.profiles[].hot_speed", "fleet.profiles[].throttled_speed"),
    Renamed(
        "selection.name",
        "selection.name",
        {"sample": "random", "energy": "eafl", "loss_fair": "power_of_choice", "thrifty": "energy_delay"},
    ),
    Renamed("selection.weight", "selection.utility_weight"),
    Renamed("selection.more", "selection.candidate_factor"),
    Renamed("selection.oort.decay", "selection.oort.exploration_decay"),
    Renamed("selection.oort.least", "selection.oort.min_exploration"),
    Renamed("selection.oort.clip", "selection.oort.clip_quantile"),
    Renamed("selection.oort.preferred", "selection.oort.duration_quantile"),
    Renamed("selection.oort.window", "selection.oort.pacer_window"),
    Renamed("selection.oort.step", "selection.oort.pacer_step"),
    Renamed("selection.oort.most", "selection.oort.max_selections"),
    Renamed("cohort.memory_gib", "trainer.memory_gib"),
    Renamed("cohort.compiled", "trainer.compile"),
    Renamed("base.checkpointing", "base.gradient_checkpointing"),
    Renamed("base.compute", "base.compute_dtype"),
    Renamed("data.skew", "data.label_skew"),
    Renamed("privacy.clip", "privacy.clip_norm"),
    Renamed("privacy.draws", "privacy.noise_multiplicity"),
    Renamed("privacy.device.clip", "privacy.device.clip_norm"),
    Renamed("privacy.device.quantile", "privacy.device.target_quantile"),
    Renamed("privacy.device.clip_rate", "privacy.device.clip_norm_lr"),
    Renamed("privacy.device.participations", "privacy.device.max_participations"),
    Renamed("privacy.measuring.every", "private_eval.interval"),
    Renamed("privacy.measuring.noise_multiplier", "private_eval.noise_multiplier"),
    Renamed("privacy.measuring.clip", "private_eval.clip"),
    Renamed("adapter.frame", "adapter.lora_xs_bases"),
    Renamed("adapter.shared.learning_rate", "adapter.shared.lr"),
    Renamed("adapter.shared.optimiser", "adapter.shared.optimizer"),
    Renamed("adapter.shared.proximal", "adapter.shared.proximal_mu"),
    Renamed("strategy.decay", "adapter.shared.lr_schedule", {"false": "constant", "true": "cosine"}),
    Renamed("adapter.personal.learning_rate", "adapter.personal.lr"),
    Renamed("adapter.local.learning_rate", "adapter.baseline_local.lr"),
    Renamed("adapter.look_every", "adapter.eval_interval"),
    Renamed("evaluation.local", "evaluation.baseline_local"),
    Renamed("evaluation.gallery", "evaluation.gallery_size"),
    Renamed("evaluation.steps", "evaluation.sampling_steps"),
    Renamed("evaluation.guidance", "evaluation.guidance_scale"),
    Renamed(
        "robust.rules",
        "robust.rules",
        {"norm": "norm_bound", "geometric": "geometric_median", "trimmed": "trimmed_mean"},
    ),
)
COMPONENTS: tuple[Renamed, ...] = (
    Renamed("aggregation.options.", "aggregation."),
    Renamed("selection.options.", "selection."),
    Renamed("server_optimizer.options.", "server_optimizer."),
    Renamed("selection.oort.", "selection."),
    Renamed("robust.rules", "robust"),
    Renamed("robust.norm_bound", "robust.norm_bound.bound"),
    Renamed("robust.norm_factor", "robust.norm_bound.factor"),
    Renamed("robust.outlier_fraction", "robust.krum.outlier_fraction"),
    Renamed("robust.outlier_fraction", "robust.trimmed_mean.outlier_fraction"),
    Renamed("round_loop.mode", "round_loop"),
)
"""Keys that became groups with an option per component, or options of one component.

A stored configuration has another form here (`conf.stored_components`): one key became several.
"""
SELECTED: tuple[Renamed, ...] = tuple(
    Renamed(f"{group}.name", group)
    for group in ("aggregation", "selection", "server_optimizer", "planning", "round_loop", "grid")
)
"""Names on a command line that became options of groups. A YAML file of a component keeps its `name`."""
SERVER: tuple[Renamed, ...] = (
    Renamed("server.inner_port", "server.superlink_port"),
    Renamed("server.hosts", "server.hostnames"),
    Renamed("server.unguarded", "server.trust_local_users"),
    Renamed("server.disk_gib", "server.max_disk_gib"),
    Renamed("server.devices", "server.max_devices"),
    Renamed("server.per_holder", "server.max_devices_per_holder"),
    Renamed("server.again", "server.allow_rerun"),
    Renamed("server.patience", "server.max_idle_hours"),
    Renamed("server.limits.concurrent", "server.limits.concurrent_requests"),
    Renamed("server.limits.connections", "server.limits.connections_per_address"),
    Renamed("server.limits.slowest_kib", "server.limits.min_kib_per_second"),
    Renamed("server.limits.body_mib", "server.limits.request_memory_mib"),
)
NODE: tuple[Renamed, ...] = (
    Renamed("checkpointing", "gradient_checkpointing"),
    Renamed("rank", "max_rank"),
    Renamed("link.address", "connection.address"),
    Renamed("link.insecure", "connection.insecure"),
    Renamed("link.poll_seconds", "connection.poll_seconds"),
    Renamed("link.slow_poll_seconds", "connection.max_poll_seconds"),
    Renamed("guard.charging", "throttle.require_charging"),
    Renamed("guard.battery", "throttle.min_battery"),
    Renamed("guard.celsius", "throttle.max_celsius"),
    Renamed("guard.battery_celsius", "throttle.max_battery_celsius"),
    Renamed("guard.idle", "throttle.require_idle"),
    Renamed("guard.unmetered", "throttle.require_unmetered"),
    Renamed("guard.free_mib", "throttle.min_free_mib"),
    Renamed("guard.patience", "throttle.max_wait_seconds"),
    Renamed("guard.poll_seconds", "throttle.poll_seconds"),
    Renamed("fetch.metered", "fetch.allow_metered"),
    Renamed("fetch.free_gib", "fetch.min_free_gib"),
)
PLAN: tuple[Renamed, ...] = (
    Renamed("least_steps", "min_steps"),
    Renamed("pictures", "batch_size"),
    Renamed("hours", "max_hours"),
    Renamed("battery_share", "max_battery_fraction"),
    Renamed("rungs", "alternatives"),
)
AUDIT: tuple[Renamed, ...] = (
    Renamed("false_alarms", "false_alarm_rate"),
    Renamed("canaries.draws", "canaries.noise_multiplicity"),
    Renamed("fits.longest", "noise_tests.max_length"),
    Renamed("fits.noise", "noise_tests.noise"),
    Renamed("fits.base", "noise_tests.base"),
    Renamed("membership.time", "membership.timestep_fraction"),
    Renamed("membership.resamples", "membership.bootstrap_samples"),
)
PRETRAINING: tuple[Renamed, ...] = (
    Renamed("vae.batch", "vae.batch_size"),
    Renamed("vae.learning_rate", "vae.lr"),
    Renamed("vae.clip", "vae.max_grad_norm"),
    Renamed("vae.ema", "vae.ema_decay"),
    Renamed("vae.log_every", "vae.log_interval"),
    Renamed("vae.checkpoint_every", "vae.checkpoint_interval"),
    Renamed("diffusion.batch", "diffusion.batch_size"),
    Renamed("diffusion.learning_rate", "diffusion.lr"),
    Renamed("diffusion.clip", "diffusion.max_grad_norm"),
    Renamed("diffusion.ema", "diffusion.ema_decay"),
    Renamed("diffusion.log_every", "diffusion.log_interval"),
    Renamed("diffusion.checkpoint_every", "diffusion.checkpoint_interval"),
    Renamed("judge.batch", "judge.batch_size"),
    Renamed("judge.learning_rate", "judge.lr"),
    Renamed("judge.clip", "judge.max_grad_norm"),
    Renamed("judge.ema", "judge.ema_decay"),
    Renamed("judge.log_every", "judge.log_interval"),
    Renamed("judge.checkpoint_every", "judge.checkpoint_interval"),
    Renamed("kl", "kl_weight"),
    Renamed("guidance", "guidance_scales"),
    Renamed("style", "style_weight"),
    Renamed("smoothing", "label_smoothing"),
)
