"""Plan of a device without limits, from the configuration of a run."""

from __future__ import annotations

from conf.schemas.federation import FederationConfig
from privacy.accounting import noise_multiplier_for
from protocol.messages import ExamplePrivacy, TrainingPlan
from strategies.factory.combination import combination
from strategies.factory.personalization import build_personalization, personalization_method
from strategies.round.private_evaluation import evaluation_mechanisms


def training_plan(config: FederationConfig, *, run: str, base: str) -> TrainingPlan:
    """Compute the plan of a device without limits, with σ solved for all rounds and evaluations together.

    q and the divisor of the noised sum are public constants: they assume the number of pictures that an owner is
    expected to provide, not the actual one.

    Args:
        config: configuration of the run.
        run: name of the run.
        base: hash of its base.
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
    compression, method = config.compression, build_personalization(config)
    return TrainingPlan(
        run=run,
        round=0,
        base=base,
        rank=method.message_rank(shared.rank),
        steps=shared.steps,
        batch_size=shared.batch_size,
        learning_rate=shared.lr,
        optimiser=shared.optimizer,
        proximal=shared.proximal_mu,
        scaffold=config.drift_correction == "scaffold",
        personalization=personalization_method(config) if method.in_rounds else None,
        privacy=privacy,
        update=compression.upload,
        keep=compression.keep_fraction,
        feedback=combination(config).feedback,
    )
