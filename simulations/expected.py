"""How long what follows the rounds will take, told in rounds before any of it has begun."""

from __future__ import annotations

from conf.schemas import Simulation

TRAINED, DRAWN = 3.0, 1.0
"""Work of one example: a forward and a backward pass, about twice as dear, or a forward pass alone."""


def after_rounds(config: Simulation) -> float:
    """Work that follows the last round, in rounds: personal adapters, everybody alone, the gallery.

    Early stopping may end training before, so this is more often too long than too short.
    """
    data, shared, personal = config.data, config.adapter.shared, config.adapter.personal
    judged = config.evaluation.devices or max(data.writers, len(data.pictures))
    sampled = config.fleet.sample or data.count()
    measured = (config.fleet.evaluate or sampled) * data.validation * config.evaluation.timesteps * DRAWN
    one_round = sampled * shared.steps * shared.batch_size * TRAINED + measured
    steps = personal.steps + (config.rounds * shared.steps + personal.steps if config.evaluation.local else 0)
    trained = judged * steps * personal.batch_size * TRAINED
    arms = 3 if config.evaluation.local else 2  # base and shared draw each caption once for everybody
    guided = 2 if config.evaluation.guidance > 1 else 1
    drawn = judged * config.evaluation.gallery * arms * config.evaluation.steps * guided * DRAWN
    return (trained + drawn) / one_round
