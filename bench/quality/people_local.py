"""Training without others: one adapter for each person, from the own letters only.

Jobs of all people and settings share passes. A curve has the loss on the held-out letters at every `every` steps of one
training: training for fewer steps is the beginning of training for more. The oracle keeps each person's best step on
these very letters, which no device could do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from bench.quality.people_settings import LocalSettings
from client.data import Pictures
from common.seeding import derive_seed
from conf.compose import compose
from conf.schemas.simulation import SimulationConfig
from models.base import base as bases
from models.base.base import Base
from models.lora.adapter import Adapter, init_adapter
from simulations.evaluation import Perform
from simulations.fleet.people import load_people
from simulations.setup import make_perform
from training.capacity import budget
from training.jobs import (
    EarlyStopping,
    EncodeJob,
    Examples,
    GeneratedImages,
    GenerateJob,
    Job,
    MeasureJob,
    Picture,
    Prior,
    Result,
    TrainedAdapter,
    TrainJob,
)
from typefaces.people import CLASSES

PRIOR_STEPS = 8  # sampling steps of the letters of prior preservation


@dataclass(frozen=True)
class LocalTask:
    """Training of some people under several settings, all at the same sites."""

    overrides: tuple[str, ...]
    """Overrides of a simulation of these people, for their data, base and seed."""
    settings: tuple[LocalSettings, ...]
    total: int
    """Steps of the curve: as many as a member of the federation takes."""
    every: int
    """Steps between its points."""
    grid: bool = False
    """Whether the settings are only compared: training to a tuned end is left out, unless validation letters end it."""


class LocalPerson(NamedTuple):
    """Encoded letters of one person."""

    train: Examples
    validation: Examples
    test: Examples


class LocalResult(NamedTuple):
    """Results of one setting, plain values for JSON; a row for each person."""

    people: list[str]
    steps: list[int]
    curve: list[list[float]]
    """Held-out losses [people, steps]; step 0 is the base."""
    stopped: list[float]
    """Held-out losses [people] where the settings end training; empty in a grid."""


def train_people(task: LocalTask) -> list[tuple[LocalResult, dict[str, Adapter]]]:
    """Train all people under all settings of a task.

    Returns:
        For each setting its results, and the adapters of people at the tuned end of training.
    """
    assert len({setting.sites for setting in task.settings}) == 1
    config = compose([*task.overrides, f"adapter.sites={task.settings[0].sites}"])
    base = load_base(config)
    perform = make_perform(config, base, budget(config.trainer.memory_gib, base.device))
    pictures = {writer.name: writer.pictures for writer in load_people(config.data).members}
    people = encode_people(pictures, perform)
    prior = prior_letters(config.seed, perform) if any(setting.prior for setting in task.settings) else None
    jobs: list[Job] = []
    for setting in task.settings:
        curves = curve_jobs(setting, people, base, prior, seed=config.seed, total=task.total, every=task.every)
        jobs += curves if _ends(task, setting) else curves[: len(people)]
    trained = perform(jobs)
    results = iter(trained if task.grid else _successful(trained))
    points, outcomes = curve_points(task.total, task.every), []
    for setting in task.settings:
        losses = [_curve(next(results), points) for _ in people]
        ended = {name: next(results) for name in people} if _ends(task, setting) else {}
        ends = {name: result.adapter for name, result in ended.items() if isinstance(result, TrainedAdapter)}
        measure: list[Job] = [MeasureJob(examples=people[name].test, adapter=ends[name]) for name in ends]
        measured = dict(zip(ends, _successful(perform(measure)), strict=True))
        stopped = [cast(float, measured.get(name, math.inf)) for name in ended]
        outcomes.append((LocalResult(list(people), points, losses, stopped), ends))
    return outcomes


def _curve(result: Result | Exception, points: Sequence[int]) -> list[float]:
    """Return the losses of a training at all points; they are infinite if it failed, as with too high a rate."""
    failed = [math.inf] * len(points)
    return list(result.validation_losses) if isinstance(result, TrainedAdapter) else failed


def _ends(task: LocalTask, setting: LocalSettings) -> bool:
    return not task.grid or setting.validated


def load_base(config: SimulationConfig) -> Base:
    """Load the base of a configuration."""
    return bases.load(
        config.base.path,
        sites=config.adapter.sites,
        weights=config.base.weights,
        device=config.base.device,
        compute=config.base.compute_dtype,
        resolution=config.base.resolution,
    )


def curve_points(total: int, every: int) -> list[int]:
    """Return the steps at which a curve is measured: 0, every `every` steps, and the last one."""
    return [*range(0, total, every), total]


def encode_people(pictures: Mapping[str, Pictures], perform: Perform) -> dict[str, LocalPerson]:
    """Encode the letters of people by name."""
    jobs: list[Job] = [EncodeJob(pictures=split) for splits in pictures.values() for split in splits]
    examples = iter(cast(list[Examples], _successful(perform(jobs))))
    return {name: LocalPerson(next(examples), next(examples), next(examples)) for name in pictures}


def prior_letters(seed: int, perform: Perform) -> Examples:
    """Let the base draw one picture of each character, and encode them."""
    captions = list(CLASSES)
    job = GenerateJob(captions=captions, adapters=(), seed=derive_seed(seed, "prior"), steps=PRIOR_STEPS)
    (drawn,) = _successful(perform([job]))
    letters = zip(cast(GeneratedImages, drawn).pictures, captions, strict=True)
    (examples,) = _successful(perform([EncodeJob(pictures=[Picture(pixels, text) for pixels, text in letters])]))
    return cast(Examples, examples)


def curve_jobs(
    setting: LocalSettings,
    people: Mapping[str, LocalPerson],
    base: Base,
    prior: Examples | None,
    *,
    seed: int,
    total: int,
    every: int,
) -> list[TrainJob]:
    """Return two jobs for each person: all for the curve, then all that end where the settings say.

    Both follow the same random streams, so the second one is the beginning of the first.

    Args:
        setting: settings of the training.
        people: encoded letters by name.
        base: base with the sites of the settings.
        prior: letters of prior preservation.
        seed: seed of the run.
        total: steps of the curve.
        every: steps between its points.
    """
    end = total if setting.validated else min(setting.steps, total)

    def job(name: str, steps: int, stop: Examples | None) -> TrainJob:
        return TrainJob(
            client=name,
            round=0,
            purpose="local",
            seed=seed,
            examples=people[name].train,
            start=init_adapter(base.sites, setting.rank, derive_seed(seed, name, "local")),
            steps=steps,
            batch_size=setting.batch_size,
            learning_rate=setting.lr,
            proximal=setting.proximal,
            early_stopping=None if stop is None else EarlyStopping(validation=stop, every=every, patience=total + 1),
            prior=Prior(examples=prior, weight=setting.prior) if prior and setting.prior else None,
        )

    curves = [job(name, total, person.test) for name, person in people.items()]
    ends = [job(name, end, person.validation if setting.validated else None) for name, person in people.items()]
    return [*curves, *ends]


def _successful(results: Sequence[Result | Exception]) -> list[Result]:
    """Return results; raise the first error."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return cast(list[Result], list(results))
