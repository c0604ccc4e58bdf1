"""Build the strategy of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas.cohort import EligibilityConfig
from conf.schemas.federation import FederationConfig
from models.base.base import Base
from models.files import assets
from models.lora.adapter import Adapter, Sites
from models.lora.lora_xs import load_bases
from privacy.accounting import noise_multiplier_for
from privacy.central import AdaptiveClip, GaussianMechanism
from privacy.noise import NoiseSource, noise_source
from protocol.messages import TrainingPlan
from strategies.central_dp import CentralDP, ChargeLedger, DeviceBudget
from strategies.clock import Clock
from strategies.cohort import CohortRule
from strategies.download import AdapterFormat
from strategies.factory.aggregation import build_aggregation, build_replay_filter, build_server_optimizer
from strategies.factory.selection import build_evaluation_selection, build_selection, selection_name
from strategies.phases.evaluation import EvaluationRule
from strategies.planning.plan import CosineDecay, PlanLimits
from strategies.planning.planner import Planning
from strategies.planning.site_selection import SiteSelector, base_pass_costs
from strategies.registry import AGGREGATIONS, Combination, incompatibility, refusal_reason
from strategies.reply_checks import ReplyChecks
from strategies.round.private_evaluation import evaluation_mechanisms, evaluation_policy
from strategies.selection.eligible import Eligibility
from strategies.server_update import ServerUpdate
from strategies.strategy import FederatedStrategy
from strategies.validation import check_components, check_round_loop


def build(
    config: FederationConfig,
    plan: TrainingPlan,
    sites: Sites,
    *,
    accept_simulated: bool,
    ledger: ChargeLedger | None = None,
    clock: Clock | None = None,
    base: Base | None = None,
    memory_factor: float = 1.0,
) -> FederatedStrategy:
    """Build the strategy of a configuration.

    Args:
        config: configuration of the run.
        plan: plan of a device without limits.
        sites: sites of the adapter.
        accept_simulated: for tests and simulations: accept private updates with reproducible noise, and use
            reproducible noise on the server. Must be False in a real federation.
        ledger: the server's ledger, required for device-level privacy.
        clock: clock of the run; None: wall time.
        base: base of the run, required by planning.name=device to predict costs.
        memory_factor: factor on the predicted memory of a pass, in a simulation of a larger base.

    Raises:
        AntherError: a combination that can't be private (`strategies.registry`), or settings that contradict each
            other.
    """
    check_components(config)
    chosen = combination(config)
    if reason := incompatibility(chosen):
        raise AntherError(reason)
    if reason := refusal_reason(chosen):
        names = " or ".join(name for name in AGGREGATIONS if refusal_reason(replace(chosen, aggregation=name)) is None)
        advice = f"use aggregation={names}" if names else "use privacy=none"
        raise AntherError(f"privacy={chosen.level}: {reason}; {advice} (docs/privacy.md)")
    check_round_loop(config)
    rule = build_aggregation(config)
    lora_xs_bases = _load_lora_xs_bases(config, sites)
    seed = config.seed if accept_simulated else None
    # A control variate covers every direction, and device-level privacy protects the link of a device.
    reducible = rule.mixed_ranks and not plan.scaffold and not config.privacy.of_devices
    limits = PlanLimits(
        metered_rank=config.planning.metered_rank if reducible else None,
        metered_update=config.compression.metered_upload,
        feedback=rule.stable_factors,
        deadline=config.planning.deadline,
        joules=config.planning.max_joules,
        battery_share=config.planning.max_battery_fraction,
    )
    central_dp = (
        _central_dp(config, plan.run, sites, lora_xs_bases, seed, ledger) if config.privacy.of_devices else None
    )
    replay_seed = None if seed is None else derive_seed(seed, "replay")
    return FederatedStrategy(
        plan=plan,
        format=AdapterFormat(
            sites=sites,
            adapted=None if config.adapter.sites is None else tuple(sites),
            lora_xs_bases=lora_xs_bases,
            precision=config.compression.download,
        ),
        update=ServerUpdate(
            aggregation=rule,
            server_optimizer=build_server_optimizer(config, rule),
            central_dp=central_dp,
            quorum=config.round_loop.quorum,
        ),
        cohort=CohortRule(
            selection=build_selection(config, seed),
            eligibility=_eligibility(config.cohort.eligibility),
            max_state_age=config.cohort.max_state_age,
        ),
        planning=Planning(
            limits=limits,
            site_selector=_build_site_selector(config, base, memory_factor),
            lr_schedule=CosineDecay(rounds=config.rounds) if config.adapter.shared.lr_schedule == "cosine" else None,
        ),
        evaluation=EvaluationRule(
            policy=evaluation_policy(config, simulated=accept_simulated),
            selection=build_evaluation_selection(config),
            timesteps=config.evaluation.timesteps,
        ),
        checks=ReplyChecks(
            accept_simulated=accept_simulated, replay_filter=build_replay_filter(config, sites, seed=replay_seed)
        ),
        clock=clock,
    )


def _eligibility(settings: EligibilityConfig) -> Eligibility:
    return Eligibility(
        idle=settings.idle,
        battery=settings.min_battery,
        cool=settings.cool,
        unmetered=settings.unmetered,
        memory_gib=settings.min_memory_gib,
        pictures=settings.has_pictures,
    )


def _build_site_selector(config: FederationConfig, base: Base | None, memory_factor: float) -> SiteSelector | None:
    """Build the site selector of planning.name=device; None if devices train all sites."""
    if config.planning.name == "full":
        return None
    if base is None:
        raise ValueError("base: required by planning.name=device")
    return SiteSelector(costs=base_pass_costs(base, config.adapter.shared.rank), memory_factor=memory_factor)


def _load_lora_xs_bases(config: FederationConfig, sites: Sites) -> Adapter | None:
    """Load the fixed factors, if only cores are trained."""
    if config.adapter.lora_xs_bases is None:
        return None
    file = assets.locate(config.adapter.lora_xs_bases)
    return load_bases(file / "frame.safetensors" if file.is_dir() else file, sites, config.adapter.shared.rank)


def combination(config: FederationConfig) -> Combination:
    """Return the names of the components that a configuration selects."""
    return Combination(
        aggregation=config.aggregation.name,
        robust=tuple(config.robust.rules),
        selection=selection_name(config),
        timing=config.round_loop.mode,
        optimizer=config.server_optimizer.name,
        level=config.privacy.level,
    )


def _central_dp(
    config: FederationConfig,
    run: str,
    sites: Sites,
    lora_xs_bases: Adapter | None,
    seed: int | None,
    ledger: ChargeLedger | None,
) -> CentralDP:
    """Build the server's clip and noise, with σ solved for the largest total charge of one device.

    Args:
        config: configuration of the run.
        run: its name.
        sites: sites of the adapter.
        lora_xs_bases: fixed factors, if only cores are trained.
        seed: seed of the noise; None: randomness of the operating system.
        ledger: the server's ledger.
    """
    if ledger is None:
        raise ValueError("ledger: required for device-level privacy")
    settings, cohort, devices = config.privacy.device, config.cohort, config.data.count()
    participations = (
        None if cohort.sampling_rate is not None else min(settings.max_participations or config.rounds, config.rounds)
    )
    if participations is None and settings.max_participations is not None:
        raise AntherError(
            f"privacy.device.max_participations={settings.max_participations}: with cohort.sampling_rate every device "
            "is charged for every round; set it to null"
        )
    size = devices if cohort.size is None else cohort.size
    if participations is not None and devices * participations < size * config.rounds:
        raise AntherError(
            f"privacy.device.max_participations={participations}: {devices} devices are too few for {config.rounds} "
            f"rounds of {size}; lower cohort.size or rounds, or raise it"
        )
    other_releases = evaluation_mechanisms(config)
    budget = DeviceBudget(
        epsilon=settings.epsilon or config.privacy.epsilon,
        delta=settings.delta or config.privacy.delta,
        other_releases=other_releases,
        participations=participations,
    )
    rate = 1.0 if cohort.sampling_rate is None else cohort.sampling_rate
    z = noise_multiplier_for(
        epsilon=budget.epsilon,
        delta=budget.delta,
        sampling_rate=rate,
        steps=participations or config.rounds,
        other_events=other_releases,
    )
    expected = size if cohort.sampling_rate is None else rate * devices
    adaptive = None
    if settings.target_quantile is not None:
        adaptive = AdaptiveClip(
            quantile=settings.target_quantile, rate=settings.clip_norm_lr, noise_stddev=expected / 20
        )
    return CentralDP(
        run=run,
        sites=sites,
        mechanism=GaussianMechanism(noise_multiplier=z, expected=expected, adaptive=adaptive),
        sampling_rate=rate,
        clip=settings.clip_norm,
        budget=budget,
        noise=_noise("updates", seed),
        ledger=ledger,
        lora_xs_bases=lora_xs_bases,
    )


def _noise(purpose: str, seed: int | None) -> Callable[[int], NoiseSource]:
    """Return a function from a round to the server's noise source; without a seed, from the operating system."""
    return partial(noise_source, purpose=purpose, client="server", seed=seed)
