"""The plan of a device without limits, from a run's configuration."""

from __future__ import annotations

from common.errors import AntherError
from conf.schemas.simulation import SimulationConfig
from privacy.accounting import noise_multiplier_for
from protocol.messages import ExamplePrivacy, TrainingPlan
from strategies.aggregation import Aggregation
from strategies.aggregation.build import aggregation
from strategies.private_evaluation import evaluation_mechanisms


def training_plan(config: SimulationConfig, *, run: str, base: str) -> TrainingPlan:
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
            other_events=evaluation_mechanisms(config),
        )
        privacy = ExamplePrivacy(
            noise_multiplier=sigma,
            clip=config.privacy.clip,
            sampling_rate=rate,
            draws=config.privacy.draws,
            delta=config.privacy.delta,
        )
    chosen, rule = config.strategy, aggregation(config)
    if chosen.keep < 1 and not rule.stable_factors:
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
        feedback=rule.stable_factors and chosen.update != "fp32",
    )


def _uncorrected(config: SimulationConfig, rule: Aggregation) -> str | None:
    """Why SCAFFOLD's control variates would mean nothing, and how to mend it; None if they go with all the rest."""
    chosen = config.strategy
    if not rule.stable_factors:
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
