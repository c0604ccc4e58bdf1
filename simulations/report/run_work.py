"""Estimated work of a run, in forward passes of one example, for the display of the time left."""

from __future__ import annotations

from conf.schemas.simulation import SimulationConfig
from simulations.report.time_left import RunWork
from strategies.factory.personalization import build_personalization
from training.personalization import steps_by_round, total_steps

TRAINED, DRAWN = 3.0, 1.0
"""Work per example: forward and backward pass (about twice the forward pass), or forward pass only."""


def run_work(config: SimulationConfig) -> RunWork:
    """Estimate the work of the rounds, and that of personal adapters, local baselines and the gallery after them.

    Early stopping may end training sooner, so this is more often an overestimate than an underestimate.
    """
    data, shared, personal = config.data, config.adapter.shared, config.adapter.personal
    method = build_personalization(config)
    evaluated = (config.evaluation.devices or data.owner_count()) + len(data.newcomers)
    sampled = config.cohort.size or data.count()
    measured = (config.cohort.eval_size or sampled) * data.validation * config.evaluation.timesteps * DRAWN
    by_round = steps_by_round(method, rounds=config.rounds, shared=shared.steps)
    rounds = [sampled * steps * shared.batch_size * TRAINED + measured for steps in by_round]
    steps = method.all_steps_after(personal.steps)
    if config.evaluation.baseline_local:
        steps += total_steps(method, rounds=config.rounds, shared=shared.steps, personal=personal.steps)
    trained = evaluated * steps * personal.batch_size * TRAINED
    prior = evaluated * data.train * method.drawing_steps * DRAWN  # a picture has its own caption, at most
    arms = 3 if config.evaluation.baseline_local else 2  # base and shared draw each caption once for all devices
    guided = 2 if config.evaluation.guidance_scale > 1 else 1
    drawn = evaluated * config.evaluation.gallery_size * arms * config.evaluation.sampling_steps * guided * DRAWN
    return RunWork(rounds, trained + prior + drawn)
