"""The arms on glyphs that nobody trained on: base, local, shared, personal.

*local*, which may be left out, is the same device alone: the total steps and the total rank that it spends on the other
two, a learning rate of its own, its best validation checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from common.seeding import derive_seed
from conf.schemas.simulation import SimulationConfig
from models.base.base import Base
from models.lora.adapter import Adapter, concatenate, init_adapter
from models.lora.batched_lora import stack_adapters, to_device
from simulations.fleet.participants import Participant
from training.inference import draw
from training.jobs import EarlyStopping, EncodeJob, Examples, Job, MeasureJob, Result, TrainedAdapter, TrainJob
from training.memory import inference_share
from typefaces.judge import Judge, legible, style_match

BASE, REAL = "base", "real"  # the arm without an adapter, and the pictures that were held out
Perform = Callable[[list[Job]], Sequence[Result | Exception]]
Adapters = Mapping[str, Mapping[str, Adapter]]  # arm -> device -> adapter, in the order of the arms; base has none


@dataclass(frozen=True)
class Gallery:
    """One person's gallery: real held-out pictures beside each arm's."""

    captions: tuple[str, ...]
    arms: dict[str, np.ndarray]  # 'real' and every arm -> uint8 [n, H, W] or [n, H, W, 3]


class Score(NamedTuple):
    """What the judge says of one person's letters under one arm."""

    legibility: float | None = None  # share read as the writer's own
    style: float | None = None  # 1: always nearest to the writer's own; 0.5: chance


class Pools(NamedTuple):
    """Everybody's pictures as the denoiser sees them, by name."""

    train: dict[str, Examples]
    validation: dict[str, Examples]
    test: dict[str, Examples]


def encoded(people: Sequence[Participant], perform: Perform) -> Pools:
    """All splits in one go."""
    jobs: list[Job] = [EncodeJob(pictures=pictures) for person in people for pictures in person.pictures]
    found = iter(cast(Examples, _sound(result)) for result in perform(jobs))
    pools = {person.name: (next(found), next(found), next(found)) for person in people}
    return Pools(*({name: splits[i] for name, splits in pools.items()} for i in range(3)))


def train_local(
    config: SimulationConfig, base: Base, people: Sequence[Participant], pools: Pools, perform: Perform
) -> dict[str, Adapter]:
    """Everybody alone, from the base."""
    shared, personal, alone = config.adapter.shared, config.adapter.personal, config.adapter.local
    jobs: list[Job] = [
        TrainJob(
            client=person.name,
            round=0,
            purpose="local",
            seed=config.seed,
            examples=pools.train[person.name],
            start=init_adapter(base.sites, shared.rank + personal.rank, derive_seed(config.seed, person.name, "local")),
            steps=config.rounds * shared.steps + personal.steps,
            batch_size=personal.batch_size,
            learning_rate=alone.learning_rate,
            early_stopping=EarlyStopping(
                validation=pools.validation[person.name],
                every=config.adapter.look_every,
                patience=config.adapter.patience,
            ),
        )
        for person in people
    ]
    found = perform(jobs)
    return {
        person.name: cast(TrainedAdapter, _sound(result)).adapter for person, result in zip(people, found, strict=True)
    }


def arms(people: Sequence[Participant], local: Mapping[str, Adapter] | None, shared: Adapter, base: Base) -> Adapters:
    """What each arm adds to the base on each device; a personal adapter counts with the shared one it sits on."""
    personal = {}
    for person in people:
        kept = person.device.store.personal(base.sites)
        personal[person.name] = concatenate([kept.shared, kept.adapter]) if kept else shared
    alone = {} if local is None else {"local": local}
    return {**alone, "shared": {person.name: shared for person in people}, "personal": personal}


def losses(
    people: Sequence[Participant], adapters: Adapters, pools: Pools, perform: Perform
) -> dict[str, dict[str, float]]:
    """Held-out test loss of every person under every arm."""
    found: dict[str, dict[str, float]] = {person.name: {} for person in people}
    for arm in (BASE, *adapters):
        jobs: list[Job] = [
            MeasureJob(examples=pools.test[person.name], adapter=adapters.get(arm, {}).get(person.name))
            for person in people
        ]
        for person, result in zip(people, perform(jobs), strict=True):
            found[person.name][arm] = cast(float, _sound(result))
    return found


def gallery(
    config: SimulationConfig, base: Base, people: Sequence[Participant], adapters: Adapters, memory: int
) -> dict[str, Gallery]:
    """The first test pictures of everybody, drawn under every arm from the same noise for the same caption.

    Base and shared draw a caption alike for everybody, so each is drawn once.
    """
    chosen = {person.name: person.pictures.test[: config.evaluation.gallery] for person in people}
    wanted: dict[tuple[str, str, str], Adapter | None] = {}  # (arm, owner, caption) -> adapter
    for person in people:
        for picture in chosen[person.name]:
            for arm in (BASE, *adapters):
                adapter = adapters.get(arm, {}).get(person.name)
                wanted[arm, _owner(arm, person), picture.caption] = adapter
    distinct: dict[int, Adapter | None] = {id(adapter): adapter for adapter in wanted.values()}
    slot = {key: place for place, key in enumerate(distinct)}
    stacks = to_device(stack_adapters(base.sites, list(distinct.values())), base.like)
    latents = draw(
        base,
        captions=[caption for _, _, caption in wanted],
        seeds=[derive_seed(config.seed, caption, "gallery") for _, _, caption in wanted],
        adapters=[stacks],
        slots=[slot[id(adapter)] for adapter in wanted.values()],
        sampler=config.evaluation.sampler,
        steps=config.evaluation.steps,
        guidance=config.evaluation.guidance,
        memory=inference_share(memory),
    )
    pictures = dict(zip(wanted, base.decode(latents), strict=True))
    return {
        person.name: Gallery(
            captions=tuple(picture.caption for picture in chosen[person.name]),
            arms={
                REAL: np.stack([base.preprocess(picture.at_least(base.resolution)) for picture in chosen[person.name]]),
                **{
                    arm: np.stack([pictures[arm, _owner(arm, person), p.caption] for p in chosen[person.name]])
                    for arm in (BASE, *adapters)
                },
            },
        )
        for person in people
    }


def scores(judge: Judge, people: Sequence[Participant], drawn: Mapping[str, Gallery]) -> dict[str, dict[str, Score]]:
    """Legibility and style match of everybody's drawn letters, under every arm, by the writers' real letters.

    People whose pictures are not letters are left out; with one writer there is no other to match style against.
    """
    writers = [person for person in people if person.kind != "own"]
    styles = {p.name: judge.embed(glyphs([picture.pixels for picture in p.pictures.test])) for p in writers}
    found: dict[str, dict[str, Score]] = {}
    for person in writers:
        arms = {arm: glyphs(pictures) for arm, pictures in drawn[person.name].arms.items()}
        reading = judge.read(arms[REAL])
        others = [style for name, style in styles.items() if name != person.name]
        found[person.name] = {
            arm: Score(
                legibility=float(legible(judge.read(arms[arm]), reading).mean()),
                style=style_match(judge.embed(arms[arm]), styles[person.name], others) if others else None,
            )
            for arm in arms
            if arm != REAL
        }
    return found


def glyphs(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures of any size as the judge sees them: grey uint8 [n, 64, 64]."""
    return np.stack([np.asarray(Image.fromarray(picture).convert("L").resize((64, 64))) for picture in pictures])


def _owner(arm: str, person: Participant) -> str:
    return person.name if arm in ("local", "personal") else ""


def _sound(result: Result | Exception) -> Result:
    if isinstance(result, Exception):
        raise result
    return result
