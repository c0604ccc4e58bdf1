"""Build the strategy of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
from strategies.factory.combination import check_configuration, combination
from strategies.factory.personalization import build_personalization
from strategies.factory.planning import build_planning
from strategies.factory.selection import build_evaluation_selection, build_selection
from strategies.last_round import LastRound
from strategies.phases.evaluation import EvaluationRule
from strategies.planning.plan import CosineDecay
from strategies.planning.planner import Planning
from strategies.reply_checks import ReplyChecks
from strategies.round.private_evaluation import evaluation_mechanisms, evaluation_policy
from strategies.selection.eligible import Eligibility
from strategies.server_update import ServerUpdate
from strategies.strategy import FederatedStrategy


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
        base: base of the run, required by planning=device to predict costs.
        memory_factor: factor on the predicted memory of a pass, in a simulation of a larger base.

    Raises:
        AntherError: settings contradict each other (`strategies.validation`).
    """
    check_configuration(config)
    rule, method = build_aggregation(config), build_personalization(config)
    if method.last_round_steps is not None:
        rule = LastRound(rule, method, rounds=config.rounds)
    lora_xs_bases = _load_lora_xs_bases(config, sites)
    seed = config.seed if accept_simulated else None
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
            server_optimizer=build_server_optimizer(config),
            central_dp=central_dp,
            personalization=method,
            quorum=config.round_loop.quorum,
        ),
        cohort=CohortRule(
            selection=build_selection(config, seed),
            eligibility=_eligibility(config.cohort.eligibility),
            max_state_age=config.cohort.max_state_age,
        ),
        planning=Planning(
            limits=combination(config).limits,
            method=build_planning(config, base, memory_factor),
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


def _load_lora_xs_bases(config: FederationConfig, sites: Sites) -> Adapter | None:
    """Load the fixed factors, if only cores are trained."""
    if config.adapter.lora_xs_bases is None:
        return None
    file = assets.locate(config.adapter.lora_xs_bases)
    return load_bases(file / "frame.safetensors" if file.is_dir() else file, sites, config.adapter.shared.rank)


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
    size = devices if cohort.size is None else cohort.size
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
