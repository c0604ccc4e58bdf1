"""Estimated work after the last round, in rounds, for the display of the time left."""

from __future__ import annotations

from conf.schemas.simulation import SimulationConfig

TRAINED, DRAWN = 3.0, 1.0
"""Work per example: forward and backward pass (about twice the forward pass), or forward pass only."""


def work_after_rounds(config: SimulationConfig) -> float:
    """Estimate the work after the last round, in rounds: personal adapters, local baselines, the gallery.

    Early stopping may end training sooner, so this is more often an overestimate than an underestimate.
    """
    data, shared, personal = config.data, config.adapter.shared, config.adapter.personal
    evaluated = (config.evaluation.devices or data.owner_count()) + len(data.newcomers)
    sampled = config.cohort.size or data.count()
    measured = (config.cohort.eval_size or sampled) * data.validation * config.evaluation.timesteps * DRAWN
    one_round = sampled * shared.steps * shared.batch_size * TRAINED + measured
    steps = personal.steps + (config.rounds * shared.steps + personal.steps if config.evaluation.baseline_local else 0)
    trained = evaluated * steps * personal.batch_size * TRAINED
    arms = 3 if config.evaluation.baseline_local else 2  # base and shared draw each caption once for all devices
    guided = 2 if config.evaluation.guidance_scale > 1 else 1
    drawn = evaluated * config.evaluation.gallery_size * arms * config.evaluation.sampling_steps * guided * DRAWN
    return (trained + drawn) / one_round
