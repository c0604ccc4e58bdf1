"""A run's strategy from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.cohort import EligibilityConfig
from conf.schemas.simulation import SimulationConfig
from models.base import assets
from models.base.base import Base
from models.lora.adapter import Adapter, Sites
from models.lora.lora_xs import load_bases
from privacy.accounting import noise_multiplier_for
from privacy.central import AdaptiveClip, GaussianMechanism
from privacy.noise import NoiseSource, noise_source
from protocol.messages import TrainingPlan
from strategies.aggregation.build import aggregation, optimiser, replay
from strategies.central_dp import CentralDP, ChargeLedger, DeviceBudget
from strategies.clock import Clock
from strategies.fedbuff import BUFFER_SIZE
from strategies.planning.plan import CosineDecay, PlanLimits
from strategies.planning.site_selection import SiteSelector, base_pass_costs
from strategies.private_evaluation import evaluation_mechanisms, measuring
from strategies.registry import AGGREGATIONS, Combination, incompatibility, refusal_reason
from strategies.selection.build import evaluation, selection
from strategies.selection.eligible import Eligibility
from strategies.strategy import Federated
from strategies.unused_settings import refuse_ignored


def build(
    config: SimulationConfig,
    plan: TrainingPlan,
    sites: Sites,
    *,
    accept_simulated: bool,
    ledger: ChargeLedger | None = None,
    clock: Clock | None = None,
    base: Base | None = None,
) -> Federated:
    """The strategy that a configuration describes.

    Args:
        accept_simulated: this is a test or a simulation: take private updates made with reproducible noise, and make
            the server's own so; False in a real federation.
        ledger: of the server, where privacy per device is to be charged.
        clock: that the run goes by; None: the wall's.
        base: of the run, which planning.name=device predicts passes of.

    Raises AntherError for what can't be private together (`strategies.registry`), or does not fit together.
    """
    chosen = combination(config)
    if reason := incompatibility(chosen):
        raise AntherError(reason)
    if reason := refusal_reason(chosen):
        fit = " or ".join(name for name in AGGREGATIONS if refusal_reason(replace(chosen, aggregation=name)) is None)
        mend = f"use aggregation={fit}" if fit else "use privacy=none"
        raise AntherError(f"privacy={chosen.level}: {reason}; {mend} (docs/privacy.md)")
    refuse_ignored(config)
    _check_timing(config)
    rule = aggregation(config)
    lora_xs_bases = _lora_xs_bases(config, sites)
    if (lora_xs_bases is not None) != (rule.trains(1) == "cores"):
        mend = (
            "cores are for aggregation=fedsb" if lora_xs_bases else "aggregation=fedsb needs one, such as glyphs-frame"
        )
        raise AntherError(f"adapter.lora_xs_bases={config.adapter.lora_xs_bases}: {mend}")
    if config.compression.download != "fp32" and (lora_xs_bases or plan.scaffold):
        raise AntherError(
            f"compression.download={config.compression.download}: the factors of adapter.lora_xs_bases and SCAFFOLD's control "
            "variate travel beside the adapter, whole; use compression.download=fp32"
        )
    seed = config.seed if accept_simulated else None
    # A control variate is of every direction, and under privacy per device a link is part of what is private.
    cut = rule.mixed_ranks and not plan.scaffold and not config.privacy.of_devices
    limits = PlanLimits(
        metered_rank=config.planning.metered_rank if cut else None,
        metered_update=config.compression.metered_upload,
        feedback=rule.stable_factors,
        deadline=config.planning.deadline,
        joules=config.planning.max_joules,
        battery_share=config.planning.max_battery_fraction,
    )
    if limits.uses_transient_state and config.privacy.of_devices:
        raise AntherError(
            f"planning.max_battery_fraction={limits.battery_share}: what is left of a battery belongs to a device, and "
            f"privacy={chosen.level} hides all of one; use planning.max_joules"
        )
    if limits.metered_update is not None and config.privacy.of_devices:
        raise AntherError(
            f"compression.metered_upload={limits.metered_update}: what link a device is on belongs to it, and "
            f"privacy={chosen.level} hides all of one; use compression.upload"
        )
    level = _device_level(config, plan.run, sites, lora_xs_bases, seed, ledger) if config.privacy.of_devices else None
    return Federated(
        plan=plan,
        sites=sites,
        aggregation=rule,
        selection=selection(config, seed),
        evaluation=evaluation(config),
        measuring=measuring(config, simulated=accept_simulated),
        optimiser=optimiser(config, rule),
        download=config.compression.download,
        limits=limits,
        lora_xs_bases=lora_xs_bases,
        decay=CosineDecay(rounds=config.rounds) if config.adapter.shared.lr_schedule == "cosine" else None,
        accept_simulated=accept_simulated,
        central_dp=level,
        replay=replay(config, rule, sites, seed=None if seed is None else derive_seed(seed, "replay")),
        quorum=config.round_loop.quorum,
        fitting=_fitting(config, base),
        eligible=_eligibility(config.cohort.eligibility),
        clock=clock,
        report_age=config.cohort.max_state_age,
        adapted=None if config.adapter.sites is None else tuple(sites),
        timesteps=config.evaluation.timesteps,
    )


def _eligibility(conditions: EligibilityConfig) -> Eligibility:
    return Eligibility(
        idle=conditions.idle,
        battery=conditions.min_battery,
        cool=conditions.cool,
        unmetered=conditions.unmetered,
        memory_gib=conditions.min_memory_gib,
        pictures=conditions.has_pictures,
    )


def _fitting(config: SimulationConfig, base: Base | None) -> SiteSelector | None:
    """What chooses each device's sites, unless all of them train at all."""
    if config.planning.name == "full":
        return None
    if base is None:
        raise ValueError("base: planning.name=device predicts its passes")
    return SiteSelector(
        costs=base_pass_costs(base, config.adapter.shared.rank), memory=config.fleet.workload.memory_factor
    )


def _lora_xs_bases(config: SimulationConfig, sites: Sites) -> Adapter | None:
    """The factors that stay, if only cores are trained."""
    if config.adapter.lora_xs_bases is None:
        return None
    file = assets.locate(config.adapter.lora_xs_bases)
    return load_bases(file / "frame.safetensors" if file.is_dir() else file, sites, config.adapter.shared.rank)


def _check_timing(config: SimulationConfig) -> None:
    """Refuse how rounds are timed if it doesn't go with what they promise."""
    loop, cohort, weighting = config.round_loop, config.cohort, config.aggregation.weighting
    if loop.mode == "async" and weighting != "device":
        raise AntherError(
            f"aggregation.weighting={weighting}: an update of an older adapter comes with that one's directions, which "
            "are no slices of it; leave it device, or use round_loop.mode=sync"
        )
    if loop.mode == "async" and cohort.overselection > 1:
        raise AntherError(
            f"cohort.overselection={cohort.overselection:g}: with round_loop.mode=async nobody's reply is waited for, and none "
            "too late; leave it 1"
        )
    most = (
        ("round_loop.buffer_size", loop.buffer_size or BUFFER_SIZE)
        if loop.mode == "async"
        else ("cohort.size", cohort.size)
    )
    if most[1] is not None and loop.quorum > most[1]:
        raise AntherError(
            f"round_loop.quorum={loop.quorum}: no round has more replies than {most[0]}={most[1]}; lower the one or "
            "raise the other"
        )
    if config.privacy.of_devices:
        if cohort.overselection > 1:
            raise AntherError(
                f"cohort.overselection={cohort.overselection:g}: whose reply counts would follow from its time, and privacy "
                "per device charges those that are asked; leave it 1"
            )
        if loop.quorum > 1:
            raise AntherError(
                f"round_loop.quorum={loop.quorum}: what is private per device is released whatever came back: to keep "
                "the adapter would tell; leave it 1"
            )


def combination(config: SimulationConfig) -> Combination:
    """What a configuration chooses on each axis."""
    cohort = config.cohort
    chosen = (
        config.selection.name if cohort.size is not None else "everyone" if cohort.sampling_rate is None else "poisson"
    )
    return Combination(
        aggregation=config.aggregation.name,
        robust=tuple(config.robust.rules),
        selection=chosen,
        timing=config.round_loop.mode,
        optimiser=config.server_optimizer.name,
        level=config.privacy.level,
    )


def _device_level(
    config: SimulationConfig,
    run: str,
    sites: Sites,
    lora_xs_bases: Adapter | None,
    seed: int | None,
    ledger: ChargeLedger | None,
) -> CentralDP:
    """The server's clip and noise, σ solved for what one device can be charged for in all."""
    if ledger is None:
        raise ValueError("ledger: privacy per device is charged for in one")
    chosen, cohort, devices = config.privacy.device, config.cohort, config.data.count()
    most = None if cohort.sampling_rate is not None else min(chosen.max_participations or config.rounds, config.rounds)
    if most is None and chosen.max_participations is not None:
        raise AntherError(
            f"privacy.device.max_participations={chosen.max_participations}: with cohort.sampling_rate every device pays for every "
            "round; leave it null"
        )
    asked = devices if cohort.size is None else cohort.size
    if most is not None and devices * most < asked * config.rounds:
        raise AntherError(
            f"privacy.device.max_participations={most}: {devices} devices can't fill {config.rounds} rounds of {asked}; "
            "lower cohort.size or rounds, or raise it"
        )
    beside = evaluation_mechanisms(config)
    budget = DeviceBudget(
        epsilon=chosen.epsilon or config.privacy.epsilon,
        delta=chosen.delta or config.privacy.delta,
        beside=beside,
        participations=most,
    )
    rate = 1.0 if cohort.sampling_rate is None else cohort.sampling_rate
    z = noise_multiplier_for(
        epsilon=budget.epsilon, delta=budget.delta, sampling_rate=rate, steps=most or config.rounds, other_events=beside
    )
    expected = asked if cohort.sampling_rate is None else rate * devices
    adaptive = None
    if chosen.target_quantile is not None:
        adaptive = AdaptiveClip(quantile=chosen.target_quantile, rate=chosen.clip_norm_lr, noise_stddev=expected / 20)
    return CentralDP(
        run=run,
        sites=sites,
        mechanism=GaussianMechanism(noise_multiplier=z, expected=expected, adaptive=adaptive),
        sampling_rate=rate,
        clip=chosen.clip_norm,
        budget=budget,
        noise=_noise("updates", seed),
        ledger=ledger,
        lora_xs_bases=lora_xs_bases,
    )


def _noise(purpose: str, seed: int | None) -> Callable[[int], NoiseSource]:
    """The server's own of every round; without a seed it is the operating system's."""
    return partial(noise_source, purpose=purpose, client="server", seed=seed)
