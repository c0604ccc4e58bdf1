"""A run's strategy from its configuration."""

from __future__ import annotations

from conf.errors import AntherError
from conf.schemas import Simulation
from models.adapter import Sites
from privacy.accounting import noise_multiplier_for
from privacy.noise import stream
from protocol.messages import ExamplePrivacy, TrainingPlan
from strategies.aggregation import Aggregation
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.federated import Federated
from strategies.measuring import measuring, spending
from strategies.planning import Limits
from strategies.selection import Selection
from strategies.selection.everyone import Everyone
from strategies.selection.sample import Sample


def build(config: Simulation, plan: TrainingPlan, sites: Sites, *, accept_simulated: bool) -> Federated:
    """The strategy that `config.strategy` and `config.fleet` describe.

    Args:
        accept_simulated: take private updates made with reproducible noise; False in a real federation.

    Raises AntherError if `strategy.max_rank` does not suit the aggregation.
    """
    rule = aggregation(config)
    fleet = config.fleet
    limits = Limits(
        metered_rank=config.strategy.metered_rank if rule.mixed_ranks else None,
        deadline=config.strategy.deadline,
    )
    return Federated(
        plan=plan,
        sites=sites,
        aggregation=rule,
        selection=_asked(fleet.sample, config.seed, "selection"),
        evaluation=_asked(fleet.sample if fleet.evaluate is None else fleet.evaluate, config.seed, "evaluation"),
        measuring=measuring(config, simulated=accept_simulated),
        limits=limits,
        accept_simulated=accept_simulated,
    )


def _asked(size: int | None, seed: int, purpose: str) -> Selection:
    return Everyone() if size is None else Sample(size=size, seed=seed, purpose=purpose)


def aggregation(config: Simulation) -> Aggregation:
    """The rule that `strategy.aggregation` names."""
    rank, max_rank = config.adapter.shared.rank, config.strategy.max_rank
    if config.strategy.aggregation == "exact":
        return Exact(rank=rank, max_rank=max_rank, seed=stream(config.seed, "aggregation"))
    if max_rank not in (None, rank):
        raise AntherError(f"strategy.max_rank={max_rank}: fedit keeps adapter.shared.rank={rank}; use strategy=exact")
    return FedIT()


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
    return TrainingPlan(
        run=run,
        round=0,
        base=base,
        rank=shared.rank,
        steps=shared.steps,
        batch_size=shared.batch_size,
        learning_rate=shared.learning_rate,
        privacy=privacy,
    )
