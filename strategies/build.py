"""A run's strategy from its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from conf.errors import AntherError
from conf.schemas import Simulation
from models import assets
from models.adapter import Adapter, Sites
from models.base import Base
from models.cores import load_frame
from privacy.accounting import noise_multiplier_for
from privacy.central import Adaptive, Gaussian
from privacy.noise import NoiseSource, source, stream
from protocol.messages import ExamplePrivacy, TrainingPlan
from strategies.aggregation import Aggregation
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.flexlora import FlexLoRA
from strategies.aggregation.flora import FLoRA
from strategies.aggregation.hetlora import HetLoRA
from strategies.aggregation.raflora import RaFLoRA
from strategies.aggregation.rolora import RoLoRA
from strategies.asynchronous import per_round
from strategies.clock import Clock
from strategies.federated import Federated
from strategies.fitting import Fitting, costs_of
from strategies.measuring import measuring, spending
from strategies.optimisers import FedAvgM, FedOpt, Optimiser
from strategies.planning import Cosine, Limits
from strategies.private import Budget, DeviceLevel, Ledger
from strategies.registry import AGGREGATIONS, NONE, Combination, refusal, unfit
from strategies.robust import Rule
from strategies.robust.foolsgold import FoolsGold
from strategies.robust.geometric import GeometricMedian
from strategies.robust.guarded import Guarded
from strategies.robust.krum import MultiKrum
from strategies.robust.norm import NormBound
from strategies.robust.trimmed import Median, TrimmedMean
from strategies.selection import ByName, Selection
from strategies.selection.deadline import Deadline
from strategies.selection.eligible import Eligible
from strategies.selection.energy import Energy
from strategies.selection.everyone import Everyone
from strategies.selection.loss_fair import LossFair
from strategies.selection.oort import Oort, OortSettings
from strategies.selection.panel import Panel
from strategies.selection.poisson import Poisson
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from strategies.selection.thrifty import Thrifty


def build(
    config: Simulation,
    plan: TrainingPlan,
    sites: Sites,
    *,
    accept_simulated: bool,
    ledger: Ledger | None = None,
    clock: Clock | None = None,
    base: Base | None = None,
) -> Federated:
    """The strategy that `config.strategy`, `config.fleet` and `config.privacy` describe.

    Args:
        accept_simulated: this is a test or a simulation: take private updates made with reproducible noise, and make
            the server's own so; False in a real federation.
        ledger: of the server, where privacy per device is to be charged.
        clock: that the run goes by; None: the wall's.
        base: of the run, which strategy.planning=device predicts passes of.

    Raises AntherError for what can't be private together (`strategies.registry`), or does not fit together.
    """
    chosen = combination(config)
    if reason := unfit(chosen):
        raise AntherError(f"strategy.timing={chosen.timing}: {reason}")
    if reason := refusal(chosen):
        fit = " or ".join(name for name in AGGREGATIONS if refusal(replace(chosen, aggregation=name)) is None)
        mend = f"use strategy={fit}" if fit else "use privacy=none"
        raise AntherError(f"privacy={chosen.level}: {reason}; {mend} (docs/privacy.md)")
    _check_timing(config)
    rule = aggregation(config)
    frame = _frame(config, sites)
    if (frame is not None) != (rule.trains(1) == "cores"):
        mend = "cores are for strategy=fedsb" if frame else "strategy=fedsb needs one, such as glyphs-frame"
        raise AntherError(f"adapter.frame={config.adapter.frame}: {mend}")
    if config.strategy.download != "fp32" and (frame or plan.scaffold):
        raise AntherError(
            f"strategy.download={config.strategy.download}: the factors of adapter.frame and SCAFFOLD's control "
            "variate travel beside the adapter, whole; use strategy.download=fp32"
        )
    seed = config.seed if accept_simulated else None
    limits = Limits(
        # A control variate is of every direction.
        metered_rank=config.strategy.metered_rank if rule.mixed_ranks and not plan.scaffold else None,
        deadline=config.strategy.deadline,
        joules=config.strategy.joules,
        battery_share=config.strategy.battery_share,
    )
    if limits.momentary and config.privacy.of_devices:
        raise AntherError(
            f"strategy.battery_share={limits.battery_share}: what is left of a battery belongs to a device, and "
            f"privacy={chosen.level} hides all of one; use strategy.joules"
        )
    level = _device_level(config, plan.run, sites, frame, seed, ledger) if config.privacy.of_devices else None
    return Federated(
        plan=plan,
        sites=sites,
        aggregation=rule,
        selection=selection(config, seed),
        evaluation=evaluation(config),
        measuring=measuring(config, simulated=accept_simulated),
        optimiser=optimiser(config, rule),
        download=config.strategy.download,
        limits=limits,
        frame=frame,
        decay=_decay(config),
        accept_simulated=accept_simulated,
        device_level=level,
        quorum=config.strategy.quorum,
        fitting=_fitting(config, base),
        eligible=Eligible(**vars(config.fleet.eligible)),
        clock=clock,
        report_age=config.fleet.report_age,
    )


def _fitting(config: Simulation, base: Base | None) -> Fitting | None:
    """What chooses each device's sites, unless all of them train at all."""
    if config.strategy.planning == "full":
        return None
    if base is None:
        raise ValueError("base: planning=device predicts its passes")
    return Fitting(costs=costs_of(base, config.adapter.shared.rank), memory=config.fleet.workload.memory)


def _frame(config: Simulation, sites: Sites) -> Adapter | None:
    """The factors that stay, if only cores are trained."""
    if config.adapter.frame is None:
        return None
    file = assets.locate(config.adapter.frame)
    return load_frame(file / "frame.safetensors" if file.is_dir() else file, sites, config.adapter.shared.rank)


def _check_timing(config: Simulation) -> None:
    """Refuse how rounds are timed if it doesn't go with what they promise."""
    chosen, fleet = config.strategy, config.fleet
    if chosen.timing == "async" and chosen.weights != "device":
        raise AntherError(
            f"strategy.weights={chosen.weights}: an update of an older adapter comes with that one's directions, which "
            "are no slices of it; leave it device, or use strategy.timing=sync"
        )
    if config.privacy.of_devices:
        if fleet.overselect > 1:
            raise AntherError(
                f"fleet.overselect={fleet.overselect:g}: whose reply counts would follow from its time, and privacy "
                "per device charges those that are asked; leave it 1"
            )
        if chosen.quorum > 1:
            raise AntherError(
                f"strategy.quorum={chosen.quorum}: what is private per device is released whatever came back: to keep "
                "the adapter would tell; leave it 1"
            )


def _decay(config: Simulation) -> Callable[[float, int], float] | None:
    """Of the learning rate, by the number that a plan has."""
    if not config.strategy.decay:
        return None
    cosine = Cosine(rounds=config.rounds)
    return cosine if config.strategy.timing == "sync" else per_round(cosine)


def combination(config: Simulation) -> Combination:
    """What a configuration chooses on each axis."""
    fleet = config.fleet
    chosen = config.selection.name if fleet.sample is not None else "everyone" if fleet.rate is None else "poisson"
    return Combination(
        aggregation=config.strategy.aggregation,
        robust=tuple(config.strategy.robust),
        selection=chosen,
        timing=config.strategy.timing,
        optimiser=config.strategy.optimiser,
        level=config.privacy.level,
    )


def selection(config: Simulation, seed: int | None) -> Selection:
    """Who is asked to train: everyone, `fleet.sample` of them by `selection`, or each by the probability `fleet.rate`.

    Args:
        seed: of the coins that this probability is tossed with; None: nobody can repeat them.

    Raises AntherError for a selection without what it goes by.
    """
    if config.selection.name != "sample" and config.fleet.sample is None:
        raise AntherError(f"selection={config.selection.name}: chooses the devices of a fleet.sample; give its size")
    if config.fleet.rate is not None:
        return Poisson(rate=config.fleet.rate, coins=_noise("selection", seed))
    chosen, deadline = config.selection, config.strategy.deadline
    if config.fleet.sample is None:
        return Everyone()
    size, oort = math.ceil(config.fleet.sample * config.fleet.overselect), OortSettings(**vars(chosen.oort))
    match chosen.name:
        case "round_robin":
            return RoundRobin(size=size)
        case "oort":
            return Oort(size=size, seed=config.seed, settings=oort)
        case "energy":
            return Energy(size=size, seed=config.seed, weight=chosen.weight, settings=oort)
        case "deadline":
            if deadline is None:
                raise AntherError("selection=deadline: there is none; give strategy.deadline")
            return Deadline(size=size, seconds=deadline, more=chosen.more, seed=config.seed)
        case "loss_fair":
            return LossFair(size=size, more=chosen.more, seed=config.seed)
        case "thrifty":
            return Thrifty(size=size, more=chosen.more, seed=config.seed)
    return Sample(size=size, seed=config.seed)


def evaluation(config: Simulation) -> ByName:
    """Who measures: as many as `fleet.evaluate`, else as `fleet.sample`; all if neither is given.

    The same every round. Under privacy others every round, since each measurement is charged to whoever makes it.
    """
    size = config.fleet.sample if config.fleet.evaluate is None else config.fleet.evaluate
    if size is None or config.privacy.level != NONE:
        return Everyone() if size is None else Sample(size=size, seed=config.seed, purpose="evaluation")
    return Panel(size=size, seed=config.seed)


def _device_level(
    config: Simulation,
    run: str,
    sites: Sites,
    frame: Adapter | None,
    seed: int | None,
    ledger: Ledger | None,
) -> DeviceLevel:
    """The server's clip and noise, σ solved for what one device can be charged for in all."""
    if ledger is None:
        raise ValueError("ledger: privacy per device is charged for in one")
    chosen, fleet, devices = config.privacy.device, config.fleet, config.data.count()
    most = None if fleet.rate is not None else min(chosen.participations or config.rounds, config.rounds)
    if most is None and chosen.participations is not None:
        raise AntherError(
            f"privacy.device.participations={chosen.participations}: with fleet.rate every device pays for every "
            "round; leave it null"
        )
    asked = devices if fleet.sample is None else fleet.sample
    if most is not None and devices * most < asked * config.rounds:
        raise AntherError(
            f"privacy.device.participations={most}: {devices} devices can't fill {config.rounds} rounds of {asked}; "
            "lower fleet.sample or rounds, or raise it"
        )
    beside = spending(config)
    budget = Budget(
        epsilon=chosen.epsilon or config.privacy.epsilon,
        delta=chosen.delta or config.privacy.delta,
        beside=beside,
        participations=most,
    )
    rate = 1.0 if fleet.rate is None else fleet.rate
    z = noise_multiplier_for(
        epsilon=budget.epsilon, delta=budget.delta, sampling_rate=rate, steps=most or config.rounds, beside=beside
    )
    expected = asked if fleet.rate is None else rate * devices
    adaptive = None
    if chosen.quantile is not None:
        adaptive = Adaptive(quantile=chosen.quantile, rate=chosen.clip_rate, deviation=expected / 20)
    return DeviceLevel(
        run=run,
        sites=sites,
        mechanism=Gaussian(noise_multiplier=z, expected=expected, adaptive=adaptive),
        sampling_rate=rate,
        clip=chosen.clip,
        budget=budget,
        noise=_noise("updates", seed),
        ledger=ledger,
        frame=frame,
    )


def _noise(purpose: str, seed: int | None) -> Callable[[int], NoiseSource]:
    """The server's own of every round; without a seed it is the operating system's."""
    return partial(source, purpose=purpose, client="server", seed=seed)


def aggregation(config: Simulation) -> Aggregation:
    """The rule that `strategy.aggregation` names, behind those that `strategy.robust` does.

    Raises AntherError for a setting that it has not.
    """
    rule, chosen = _aggregation(config), config.strategy
    if not chosen.robust:
        return rule
    judging: dict[str, Rule] = {
        "norm": NormBound(bound=chosen.norm_bound, factor=chosen.norm_factor),
        "krum": MultiKrum(outliers=chosen.outliers),
        "foolsgold": FoolsGold(),
        "geometric": GeometricMedian(),
    }
    entrywise = {"median": Median(), "trimmed": TrimmedMean(outliers=chosen.outliers)}
    last = chosen.robust[-1]
    parts = {rule.trains(number) for number in (1, 2)} - {"both"}
    if last in entrywise and (parts or chosen.keep < 1):
        given = f"strategy={chosen.aggregation}" if parts else "strategy.keep"
        raise AntherError(f"strategy.robust: {last} turns the factors, {given} needs them as they are; use geometric")
    whole = chosen.aggregation in ("exact", "flora")
    return Guarded(
        rule,
        rules=[judging[name] for name in chosen.robust if name in judging],
        entrywise=entrywise.get(last),
        rank=chosen.max_rank if whole else config.adapter.shared.rank,
        seed=stream(config.seed, "robust"),
    )


def _aggregation(config: Simulation) -> Aggregation:
    """The rule that `strategy.aggregation` names."""
    chosen, rank, seed = config.strategy, config.adapter.shared.rank, stream(config.seed, "aggregation")
    name = chosen.aggregation
    if name == "exact":
        by_slice = chosen.weights == "rank_slice"
        return Exact(rank=rank, max_rank=chosen.max_rank, energy=chosen.energy, by_slice=by_slice, seed=seed)
    if chosen.weights != "device":
        raise AntherError(f"strategy.weights={chosen.weights}: {name} weighs whole devices; use strategy=exact")
    if chosen.max_rank not in (None, rank):
        raise AntherError(
            f"strategy.max_rank={chosen.max_rank}: {name} goes by adapter.shared.rank={rank}; use strategy=exact"
        )
    if chosen.energy is not None:
        raise AntherError(f"strategy.energy={chosen.energy}: {name} goes by adapter.shared.rank; use strategy=exact")
    match name:
        case "flexlora":
            return FlexLoRA(rank=rank, seed=seed)
        case "flora":
            return FLoRA(rank=rank, seed=seed)
        case "hetlora":
            return HetLoRA()
        case "ffa":
            return FFA()
        case "rolora":
            return RoLoRA()
        case "fedsa":
            return FedSA()
        case "fedsvd":
            return FedSVD(seed=seed)
        case "fedsb":
            return FedSB()
        case "raflora":
            return RaFLoRA(rank=rank, seed=seed)
    return FedIT()


def optimiser(config: Simulation, rule: Aggregation) -> Optimiser | None:
    """The server's, as `strategy.optimiser` names it; None if the rule's mean is the next adapter.

    Raises AntherError for a rule whose factors are new each round.
    """
    chosen = config.strategy
    if chosen.optimiser == "none":
        return None
    if turned := rule.sensitivity.turned:
        raise AntherError(
            f"strategy.optimiser={chosen.optimiser}: a change of factors adds up over rounds only where they stay the "
            f"same, and of {chosen.aggregation} {turned}; use strategy=exact or strategy=fedit, without median or "
            "trimmed, or leave it none"
        )
    if chosen.optimiser == "fedavgm":
        return FedAvgM(rate=chosen.server_rate or 1.0, momentum=chosen.momentum)
    return FedOpt(
        rate=chosen.server_rate or 0.003,
        momentum=chosen.momentum,
        second=chosen.second_moment,
        tau=chosen.tau,
        yogi=chosen.optimiser == "fedyogi",
    )


def training_plan(config: Simulation, *, run: str, base: str) -> TrainingPlan:
    """What a device without limits is asked to do each round; σ is solved for all rounds and measurements together.

    q and the divisor of the noised sum are public constants: the pictures that an owner is expected to give, not those
    that were counted.
    """
    shared, privacy = config.adapter.shared, None
    if config.privacy.of_examples:
        rate = min(1.0, shared.batch_size / config.data.train)
        sigma = noise_multiplier_for(
            epsilon=config.privacy.epsilon,
            delta=config.privacy.delta,
            sampling_rate=rate,
            steps=config.rounds * shared.steps,
            beside=spending(config),
        )
        privacy = ExamplePrivacy(
            noise_multiplier=sigma,
            clip=config.privacy.clip,
            sampling_rate=rate,
            draws=config.privacy.draws,
            delta=config.privacy.delta,
        )
    chosen, rule = config.strategy, aggregation(config)
    if chosen.keep < 1 and not rule.steady:
        raise AntherError(
            f"strategy.keep={chosen.keep}: what is held back fits no later round, since {chosen.aggregation} turns or "
            "changes the factors; use strategy=fedit, or leave it 1"
        )
    scaffold = chosen.correction == "scaffold"
    if scaffold and (reason := _uncorrected(config, rule)):
        raise AntherError(f"strategy.correction=scaffold: {reason}")
    return TrainingPlan(
        run=run,
        round=0,
        base=base,
        rank=shared.rank,
        steps=shared.steps,
        batch_size=shared.batch_size,
        learning_rate=shared.learning_rate,
        optimiser=shared.optimiser,
        proximal=shared.proximal,
        scaffold=scaffold,
        privacy=privacy,
        update=chosen.update,
        keep=chosen.keep,
        feedback=rule.steady and chosen.update != "fp32",
    )


def _uncorrected(config: Simulation, rule: Aggregation) -> str | None:
    """Why SCAFFOLD's control variates would mean nothing, and how to mend it; None if they go with all the rest."""
    chosen = config.strategy
    if not rule.steady:
        return (
            f"a control variate fits no later round, since {chosen.aggregation} turns or changes the factors; use "
            "strategy=fedit"
        )
    if not rule.sensitivity.linear:
        return f"the server's control variate is a plain mean, and {chosen.aggregation} is none; use strategy=fedit"
    if config.adapter.shared.optimiser != "sgd":
        return (
            "only with plain SGD are a device's steps a sum of gradients; set adapter.shared.optimiser=sgd, and a "
            "higher adapter.shared.learning_rate"
        )
    if config.privacy.of_devices:
        return (
            f"with privacy={config.privacy.level} the server's control variate would be made of updates before they "
            "are noised; use privacy=example or none"
        )
    if chosen.robust:
        return (
            "every update enters the server's control variate, also one that strategy.robust leaves out, and from "
            "there all devices; leave one of them out"
        )
    if chosen.planning == "device":
        return "a control variate is of every site that was sent; use strategy.planning=full"
    if chosen.timing == "async":
        return (
            "a control variate belongs to one round's adapter, and with strategy.timing=async rounds overlap; use sync"
        )
    return None
