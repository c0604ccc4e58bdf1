"""Drawn letters: how many are read as their caption, and how well they match the person's style.

All held-out letters of all measured people are drawn, once under each arm and from the same noise. Both scores come
from the same drawings. Real letters are scored in the same way; the style of each is compared with the person's others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.quality.people_data import HELD_OUT
from bench.quality.people_local import load_base
from bench.quality.people_work import free_memory
from common.errors import AntherError
from common.seeding import derive_seed
from conf.compose import compose
from models.files import assets
from models.lora.adapter import from_tensors
from simulations import setup
from simulations.checks import with_people_counted
from simulations.evaluation import BASE, REAL, Adapters, Gallery, arms, gallery, glyphs
from simulations.fleet.participants import Participant, select_evaluated
from training.capacity import budget
from typefaces.judge import Judge, load, merge_classes, style_match
from typefaces.people import CLASSES

SHOWN_PEOPLE, SHOWN_LETTERS = 6, 5
ARMS = (REAL, BASE, "local", "personal")


@dataclass(frozen=True)
class DrawingTask:
    """Drawings of one federation's people, with adapters of training without others.

    Attributes:
        overrides: overrides of the federation.
        folder: its folder, with the devices' stores.
        local: folder of the training without others.
        local_sites: its `adapter.sites`.
        judges: folder of each judge; None: the shipped one.
        sheet: path of a picture with drawings of some people, if one is wanted.
    """

    overrides: tuple[str, ...]
    folder: Path
    local: Path
    local_sites: str
    judges: Mapping[str, Path | None]
    sheet: Path | None = None


def draw(task: DrawingTask) -> dict[str, Any]:
    """Draw all letters and score them.

    Returns:
        By judge, score (`read` or `style`) and arm: values of all people, in the order of their names.
    """
    free_memory()
    config = with_people_counted(compose(list(task.overrides)))
    config.evaluation = replace(config.evaluation, gallery_size=HELD_OUT["test"])
    simulation = setup.build(config, task.folder)
    people = select_evaluated(simulation.people, None, config.data.evaluated_roles)
    memory = budget(config.trainer.memory_gib, simulation.base.device)

    def drawn(base: Any, adapters: Adapters) -> dict[str, Gallery]:
        return gallery(config.evaluation, base, people, adapters, memory=memory, seed=config.seed)

    stored_adapters = [person.device.store.personal(simulation.base.sites) for person in people]
    shared = next((stored.shared for stored in stored_adapters if stored), None)
    if shared is None:
        raise AntherError(f"{task.folder}: no person has a personal adapter; delete the folder and measure again")
    galleries = drawn(simulation.base, arms(people, None, shared, simulation.base))
    stored = torch.load(task.local / "adapters-0.pt", weights_only=True)
    local = {person.name: from_tensors(stored[person.name]) for person in people}
    own = load_base(compose([*task.overrides, f"adapter.sites={task.local_sites}"]))
    for name, letters in drawn(own, {"local": local}).items():
        galleries[name].arms["local"] = letters.arms["local"]
    simulation.database.close()
    if task.sheet:
        write_sheet(task.sheet, {person.name: galleries[person.name] for person in people})
    device = str(simulation.base.device)
    return {
        name: judged(load(folder or assets.locate("judge"), device), people, galleries)
        for name, folder in task.judges.items()
    }


def judged(
    judge: Judge, people: Sequence[Participant], galleries: Mapping[str, Gallery]
) -> dict[str, dict[str, list[float]]]:
    """Score drawings and real letters of people.

    Args:
        judge: reads letters and embeds styles.
        people: the people.
        galleries: real and drawn letters by person.
    """
    pictures = {person.name: glyphs([letter.pixels for letter in person.pictures.test]) for person in people}
    styles = {name: judge.embed(letters) for name, letters in pictures.items()}
    scores: dict[str, dict[str, list[float]]] = {"read": {}, "style": {}}
    for person in people:
        letters = galleries[person.name]
        captions = [CLASSES[caption] for caption in letters.captions]
        others = [style for name, style in styles.items() if name != person.name]
        for arm in ARMS:
            images = pictures[person.name] if arm == REAL else glyphs(letters.arms[arm])
            scores["read"].setdefault(arm, []).append(read_rate(judge.read(images), captions))
            style = real_style(styles[person.name], others) if arm == REAL else None
            if style is None:
                style = style_match(judge.embed(images), styles[person.name], others)
            scores["style"].setdefault(arm, []).append(style)
    return scores


def read_rate(classes: Sequence[int] | np.ndarray, captions: Sequence[int]) -> float:
    """Return the fraction of letters that are read as their caption, with merged classes."""
    return float((merge_classes(np.asarray(classes)) == merge_classes(captions)).mean())


def real_style(own: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Compute the style match of a person's real letters, each against the person's other letters.

    Args:
        own: styles of the letters [n, D].
        others: styles of each other person's letters [m, D].
    """
    rest = [np.delete(own, index, axis=0) for index in range(len(own))]
    return float(np.mean([style_match(own[index : index + 1], rest[index], others) for index in range(len(own))]))


def write_sheet(file: Path, galleries: Mapping[str, Gallery]) -> None:
    """Write drawings of some people, chosen by a hash of their names: base, local and personal side by side.

    A row is a person; each arm has the same letters. Real letters are not shown.

    Args:
        file: path of the PNG.
        galleries: drawings by person.
    """
    names = sorted(galleries, key=lambda name: derive_seed("sheet", name))[:SHOWN_PEOPLE]
    rows = []
    for name in names:
        cells: list[np.ndarray] = []
        for arm in ARMS[1:]:
            letters = glyphs(galleries[name].arms[arm][:SHOWN_LETTERS])
            cells += [*letters, np.full((letters.shape[1], 16), 255, np.uint8)]
        rows.append(np.concatenate(cells[:-1], axis=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(file, optimize=True)
