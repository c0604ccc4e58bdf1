"""Build the contents of a simulation's report page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import shorten
from models.base.base import Base
from server.report import totals
from server.report.page import DeviceRow, GalleryRow, Report
from server.report.pictures import SIDE, Thumbnail, Thumbnails
from server.report.snippet import loading_snippet
from server.rounds.state import RunState
from simulations.evaluation import ArmScores, Gallery
from simulations.fleet.outcomes import FleetRound
from simulations.fleet.participants import Participant
from simulations.fleet.writers import LETTERS, OWN, PICTURES
from strategies.round.metrics import zero_metrics
from training.jobs import Picture

KINDS = {
    "hand": "handwriting",
    "individual": "individual design",
    OWN: "own pictures",
    LETTERS: "letters",
    PICTURES: "pictures",
}
"""Descriptions of the kinds of people."""
MAX_TRAINING_PICTURES = 40
"""Largest number of one person's training pictures that the report shows."""


def build_report(
    settings: str,
    base: Base,
    adapters: Path,
    people: Sequence[Participant],
    evaluated: Sequence[Participant],
    state: RunState,
    scores: Mapping[str, Mapping[str, ArmScores]],
    galleries: Mapping[str, Gallery],
    summary: dict[str, Any],
    command: str,
    fleet: Sequence[FleetRound] = (),
) -> Report:
    """Build the contents of the report page.

    Args:
        settings: configuration of the run as YAML.
        base: base of the run.
        adapters: folder of the written adapters.
        people: all participants.
        evaluated: participants that were evaluated.
        state: state after the last round.
        scores: scores by person and arm.
        galleries: galleries by person.
        summary: contents of `summary.json`.
        command: command that repeats the run.
        fleet: outcomes of a timed fleet by round.
    """
    rounds = totals.round_rows(state.history)
    for row, outcome in zip(rounds, fleet, strict=False):
        row.update(joules=outcome.joules, hours=outcome.ended / 3600, lost=outcome.lost)
    return Report(
        title=title(people, sum(person.newcomer for person in evaluated)),
        command=command,
        config_yaml=settings,
        summary=summary,
        rounds=rounds,
        devices=[device_row(person, state, scores[person.name]) for person in evaluated],
        gallery=gallery([person for person in evaluated if person.name in galleries], galleries),
        use=loading_snippet(base, adapters),
        strategy=summary["strategy"],
        rates=rate_source(people, base),
        letters=all(person.has_letters for person in people),
        footer=f"Seed {summary['seed']} · configuration {summary['config_hash'][:12]}",
    )


def rate_source(people: Sequence[Participant], base: Base) -> str:
    """Describe the source of the devices' seconds and joules."""
    sources = {
        False: "from the rates that their profiles state for this base",
        True: f"predicted from the operations of one training pass of this base at {base.resolution} pixels and the "
        "sustained speed of the devices' hardware, as anther device plan does",
    }
    return "; ".join(sources[kind] for kind in sorted({person.hardware.predicted for person in people}))


def device_row(person: Participant, state: RunState, scores: Mapping[str, ArmScores]) -> DeviceRow:
    """Build the report's row of one device over all rounds; zeros if it was never asked.

    Args:
        person: owner of the device.
        state: state after the last round.
        scores: the person's scores by arm.
    """
    metrics = state.devices.get(person.name, zero_metrics())
    profile = "newcomer" if person.newcomer else person.profile
    return totals.device_row(person.name, profile, metrics, {arm: score.loss for arm, score in scores.items()})


def gallery(people: Sequence[Participant], galleries: Mapping[str, Gallery]) -> list[GalleryRow]:
    """Build the rows of the report's gallery, with pictures that together fit one page."""
    training = {person.name: person.pictures.train[:MAX_TRAINING_PICTURES] for person in people}
    counts = (sum(map(len, galleries[name].arms.values())) + len(pictures) for name, pictures in training.items())
    thumbnail = Thumbnails(sum(counts))
    return [gallery_row(person, training[person.name], galleries[person.name], thumbnail) for person in people]


def gallery_row(
    person: Participant, training: Sequence[Picture], shown_arms: Gallery, thumbnail: Callable[[np.ndarray], Thumbnail]
) -> GalleryRow:
    """Build one row of the report's gallery.

    Args:
        person: person of the row.
        training: training pictures to show.
        shown_arms: held-out and generated pictures.
        thumbnail: converts pixels [H, W] or [H, W, 3] to a thumbnail.
    """
    return GalleryRow(
        name=person.name,
        kind=f"{KINDS[person.kind]}, newcomer" if person.newcomer else KINDS[person.kind],
        given=[thumbnail(picture.at_least(SIDE)) for picture in training],
        given_captions=[shorten(picture.caption) for picture in training],
        captions=[shorten(caption) for caption in shown_arms.captions],
        arms={arm: [thumbnail(pixels) for pixels in pictures] for arm, pictures in shown_arms.arms.items()},
        training_count=len(person.pictures.train),
    )


def title(people: Sequence[Participant], newcomers: int = 0) -> str:
    """Return the title of the report: how many took part in the rounds, and how many joined after them."""
    learned = "letters" if all(person.has_letters for person in people) else "pictures"
    devices = f"{len(people)} {'device' if len(people) == 1 else 'devices'} learned their own {learned} together"
    return f"{devices}, {newcomers} joined later" if newcomers else devices
