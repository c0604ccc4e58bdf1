"""Plan of a device without limits, from the configuration of a run."""

from __future__ import annotations

from common.errors import AntherError
from conf.schemas.simulation import SimulationConfig
from privacy.accounting import noise_multiplier_for
from protocol.messages import ExamplePrivacy, TrainingPlan
from strategies.aggregation import Aggregation, declared_linearity
from strategies.factory.aggregation import build_aggregation
from strategies.round.private_evaluation import evaluation_mechanisms


def training_plan(config: SimulationConfig, *, run: str, base: str) -> TrainingPlan:
    """Compute the plan of a device without limits, with σ solved for all rounds and evaluations together.

    q and the divisor of the noised sum are public constants: they assume the number of pictures that an owner is
    expected to provide, not the actual one.

    Args:
        config: configuration of the run.
        run: name of the run.
        base: hash of its base.

    Raises:
        AntherError: settings contradict each other.
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
            clip=config.privacy.clip_norm,
            sampling_rate=rate,
            draws=config.privacy.noise_multiplicity,
            delta=config.privacy.delta,
        )
    compression, rule = config.compression, build_aggregation(config)
    if compression.keep_fraction < 1 and not rule.stable_factors:
        raise AntherError(
            f"compression.keep_fraction={compression.keep_fraction}: the residual can't be used in a later round, "
            f"since {config.aggregation.name} rotates or replaces the factors; use aggregation=fedit, or set it to 1"
        )
    scaffold = config.drift_correction == "scaffold"
    if scaffold and (reason := _scaffold_conflict(config, rule)):
        raise AntherError(f"drift_correction=scaffold: {reason}")
    return TrainingPlan(
        run=run,
        round=0,
        base=base,
        rank=shared.rank,
        steps=shared.steps,
        batch_size=shared.batch_size,
        learning_rate=shared.lr,
        optimiser=shared.optimizer,
        proximal=shared.proximal_mu,
        scaffold=scaffold,
        privacy=privacy,
        update=compression.upload,
        keep=compression.keep_fraction,
        feedback=rule.stable_factors and compression.upload != "fp32",
    )


def _scaffold_conflict(config: SimulationConfig, rule: Aggregation) -> str | None:
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
