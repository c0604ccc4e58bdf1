"""Evaluation of the arms on held-out pictures: base, local, shared, personal.

The local arm, which is optional, trains each device without the federation: with the total steps and the total rank of
the shared and personal adapters, its own learning rate, and its best validation checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from common.seeding import derive_seed
from conf.schemas.simulation import EvaluationConfig
from conf.schemas.training import AdapterConfig
from models.base.base import Base
from models.lora.adapter import Adapter, concatenate, init_adapter, scale
from models.lora.batched_lora import BatchedAdapter, stack_adapters, to_device
from simulations.fleet.participants import Participant
from training.capacity import inference_share
from training.inference import generate
from training.jobs import EarlyStopping, EncodeJob, Examples, Job, MeasureJob, Result, TrainedAdapter, TrainJob
from typefaces.judge import Judge, legible, style_match

BASE, REAL = "base", "real"  # the arm without an adapter, and the held-out pictures
Perform = Callable[[list[Job]], Sequence[Result | Exception]]
Adapters = Mapping[str, Mapping[str, Adapter]]  # arm -> device -> adapter, in the order of the arms; base has none


@dataclass(frozen=True)
class Gallery:
    """One person's gallery: held-out pictures and pictures generated under each arm."""

    captions: tuple[str, ...]
    arms: dict[str, np.ndarray]  # 'real' and every arm -> uint8 [n, H, W] or [n, H, W, 3]


class Score(NamedTuple):
    """The judge's scores of one person's letters under one arm."""

    legibility: float | None = None  # fraction read as the writer's own letter
    style: float | None = None  # 1: always nearest to the writer's own style; 0.5: chance


@dataclass(frozen=True)
class ArmScores:
    """One person's results under one arm; legibility and style only for generated letters. Stored: see `asdict`."""

    loss: float
    legibility: float | None = None
    style: float | None = None


class Pools(NamedTuple):
    """Encoded pictures by person."""

    train: dict[str, Examples]
    validation: dict[str, Examples]
    test: dict[str, Examples]


def encode_pools(people: Sequence[Participant], perform: Perform) -> Pools:
    """Encode all splits of all people in one call of `perform`."""
    jobs: list[Job] = [EncodeJob(pictures=pictures) for person in people for pictures in person.pictures]
    examples = iter(cast(Examples, _unwrap(result)) for result in perform(jobs))
    pools = {person.name: (next(examples), next(examples), next(examples)) for person in people}
    return Pools(*({name: splits[i] for name, splits in pools.items()} for i in range(3)))


def train_local(
    settings: AdapterConfig,
    base: Base,
    people: Sequence[Participant],
    pools: Pools,
    perform: Perform,
    *,
    steps: int,
    seed: int,
) -> dict[str, Adapter]:
    """Train the local arm of each person, starting from the base.

    Args:
        settings: training of the shared, the personal and the local adapters.
        base: base of the run.
        people: people to train for.
        pools: their encoded pictures.
        perform: runs jobs.
        steps: optimizer steps, as many as a device takes in all rounds and after them (`total_steps`).
        seed: seed of the run.

    Returns:
        The trained adapters by person.
    """
    shared, personal, local = settings.shared, settings.personal, settings.baseline_local
    jobs: list[Job] = [
        TrainJob(
            client=person.name,
            round=0,
            purpose="local",
            seed=seed,
            examples=pools.train[person.name],
            start=init_adapter(base.sites, shared.rank + personal.rank, derive_seed(seed, person.name, "local")),
            steps=steps,
            batch_size=personal.batch_size,
            learning_rate=local.lr,
            early_stopping=EarlyStopping(
                validation=pools.validation[person.name],
                every=settings.eval_interval,
                patience=settings.patience,
            ),
        )
        for person in people
    ]
    results = perform(jobs)
    return {
        person.name: cast(TrainedAdapter, _unwrap(result)).adapter
        for person, result in zip(people, results, strict=True)
    }


def arms(people: Sequence[Participant], local: Mapping[str, Adapter] | None, shared: Adapter, base: Base) -> Adapters:
    """Return each arm's adapter on each device; the personal arm is the personal adapter plus its shared one.

    Args:
        people: the people to evaluate.
        local: adapters of the local arm by person; None: the arm is left out.
        shared: shared adapter, as decoded by devices.
        base: base of the run.
    """
    personal = {}
    for person in people:
        stored = person.device.store.personal(base.sites)
        personal[person.name] = stored.combined if stored else shared
    local_arm = {} if local is None else {"local": local}
    return {**local_arm, "shared": {person.name: shared for person in people}, "personal": personal}


def losses(
    people: Sequence[Participant], adapters: Adapters, pools: Pools, perform: Perform
) -> dict[str, dict[str, float]]:
    """Measure the loss of every person's test pictures under every arm.

    Args:
        people: the people to evaluate.
        adapters: result of `arms`.
        pools: their encoded pictures.
        perform: runs jobs.

    Returns:
        Losses by person and arm.
    """
    by_person: dict[str, dict[str, float]] = {person.name: {} for person in people}
    for arm in (BASE, *adapters):
        jobs: list[Job] = [
            MeasureJob(examples=pools.test[person.name], adapter=adapters.get(arm, {}).get(person.name))
            for person in people
        ]
        for person, result in zip(people, perform(jobs), strict=True):
            by_person[person.name][arm] = cast(float, _unwrap(result))
    return by_person


def gallery(
    settings: EvaluationConfig,
    base: Base,
    people: Sequence[Participant],
    adapters: Adapters,
    *,
    memory: int,
    seed: int,
) -> dict[str, Gallery]:
    """Generate images for the captions of each person's first test pictures under every arm.

    Images of one caption start from the same noise. In guidance's unconditional prediction, the local and the personal
    adapter have the strength `settings.guide_strength`, towards the base and the shared adapter.

    Base and shared generate the same picture of a caption for all people, so it is generated once.

    Args:
        settings: number of images, and the sampler.
        base: base of the run.
        people: the people to evaluate.
        adapters: result of `arms`; the personal arm requires the shared one.
        memory: bytes that jobs may take.
        seed: seed of the run.

    Returns:
        Galleries by person.
    """
    shown = {person.name: person.pictures.test[: settings.gallery_size] for person in people}
    guides = guides_by_arm(adapters, settings.guide_strength)
    requests: dict[tuple[str, str, str], tuple[Adapter | None, Adapter | None]] = {}  # (arm, owner, caption)
    for person in people:
        for picture in shown[person.name]:
            for arm in (BASE, *adapters):
                guide = guides.get(arm, adapters.get(arm, {})).get(person.name)
                requests[arm, _owner(arm, person), picture.caption] = adapters.get(arm, {}).get(person.name), guide
    distinct = {(id(adapter), id(guide)): (adapter, guide) for adapter, guide in requests.values()}
    slot = {key: index for index, key in enumerate(distinct)}
    own, weaker = zip(*distinct.values(), strict=True)

    def stacked(group: Sequence[Adapter | None]) -> list[BatchedAdapter]:
        return [to_device(stack_adapters(base.sites, group), base.like)]

    latents = generate(
        base,
        captions=[caption for _, _, caption in requests],
        seeds=[derive_seed(seed, caption, "gallery") for _, _, caption in requests],
        adapters=stacked(own),
        slots=[slot[id(adapter), id(guide)] for adapter, guide in requests.values()],
        sampler=settings.sampler,
        steps=settings.sampling_steps,
        guidance=settings.guidance_scale,
        memory=inference_share(memory),
        guides=stacked(weaker) if guides else None,
    )
    pictures = dict(zip(requests, base.decode(latents), strict=True))
    return {
        person.name: Gallery(
            captions=tuple(picture.caption for picture in shown[person.name]),
            arms={
                REAL: np.stack([base.preprocess(picture.at_least(base.resolution)) for picture in shown[person.name]]),
                **{
                    arm: np.stack([pictures[arm, _owner(arm, person), p.caption] for p in shown[person.name]])
                    for arm in (BASE, *adapters)
                },
            },
        )
        for person in people
    }


def guides_by_arm(adapters: Adapters, strength: float) -> dict[str, dict[str, Adapter]]:
    """Return the adapters of guidance's unconditional prediction by arm and person, where they differ from the arm's.

    Args:
        adapters: result of `arms`; the personal arm requires the shared one.
        strength: strength of the person's own training, from 0 to 1.
    """
    if strength == 1:
        return {}
    guides = {"local": {name: scale(own, strength) for name, own in adapters.get("local", {}).items()}}
    # The personal arm holds both: (1 − s) shared + s (shared + personal).
    guides["personal"] = {
        name: concatenate([scale(adapters["shared"][name], 1 - strength), scale(both, strength)])
        for name, both in adapters.get("personal", {}).items()
    }
    return guides


def scores(
    judge: Judge, people: Sequence[Participant], galleries: Mapping[str, Gallery]
) -> dict[str, dict[str, Score]]:
    """Score the legibility and style of generated letters against the writers' real letters.

    People whose pictures are not letters are left out. With one writer there is no style score, since there is no other
    style to compare with.

    Args:
        judge: reads letters and embeds styles.
        people: the people to evaluate.
        galleries: result of `gallery`.

    Returns:
        Scores by person and arm.
    """
    writers = [person for person in people if person.has_letters]
    styles = {p.name: judge.embed(glyphs([picture.pixels for picture in p.pictures.test])) for p in writers}
    by_person: dict[str, dict[str, Score]] = {}
    for person in writers:
        arms = {arm: glyphs(pictures) for arm, pictures in galleries[person.name].arms.items()}
        reading = judge.read(arms[REAL])
        other_styles = [style for name, style in styles.items() if name != person.name]
        by_person[person.name] = {
            arm: Score(
                legibility=float(legible(judge.read(arms[arm]), reading).mean()),
                style=style_match(judge.embed(arms[arm]), styles[person.name], other_styles) if other_styles else None,
            )
            for arm in arms
            if arm != REAL
        }
    return by_person


def glyphs(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Convert pictures of any size to the judge's input: gray uint8 [n, 64, 64]."""
    return np.stack([np.asarray(Image.fromarray(picture).convert("L").resize((64, 64))) for picture in pictures])


def _owner(arm: str, person: Participant) -> str:
    return person.name if arm in ("local", "personal") else ""


def _unwrap(result: Result | Exception) -> Result:
    if isinstance(result, Exception):
        raise result
    return result
