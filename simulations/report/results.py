"""What a finished run leaves: adapters, evaluation.json, summary.json, report.html."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common import atomic_files
from common.errors import shown
from conf.schemas.simulation import SimulationConfig
from models.base import assets
from models.base.base import Base
from models.export import adapter_files
from models.lora.adapter import Adapter, concatenate
from server.report import totals
from server.report.page import DeviceRow, GalleryRow, Report, write
from server.report.pictures import SIDE, Thumbnail, Thumbnails
from server.report.snippet import loading_snippet
from server.rounds.state import RunState
from simulations import evaluation
from simulations.evaluation import Gallery, Perform, Score
from simulations.fleet.outcomes import FleetRound, gini
from simulations.fleet.participants import Participant
from simulations.report.display import Display
from simulations.run_dir import config_hash
from strategies.download import download
from strategies.round.metrics import zero_metrics
from training.jobs import Picture
from typefaces import judge

PERSONAL = "personal"  # folder of the personal adapters

GIVEN = 40
"""Pictures of one person that are shown of those trained on, at most."""


@dataclass(frozen=True)
class Judged:
    """One person's result under one arm; legibility and style only for letters that were drawn."""

    loss: float
    legibility: float | None = None
    style: float | None = None


def finish(
    config: SimulationConfig,
    folder: Path,
    base: Base,
    people: Sequence[Participant],
    chosen: Sequence[Participant],
    perform: Perform,
    memory: int,
    state: RunState,
    display: Display,
    started: float,
    command: str,
    fleet: Sequence[FleetRound] = (),
) -> dict[str, Any]:
    """Train the local arm of those who were chosen, judge all their arms, write everything; the summary.

    Args:
        fleet: what became of one that lives on a clock of its own, round by round.
    """
    pools, local = evaluation.encoded(chosen, perform), None
    if config.evaluation.local:
        display.phase("training everyone alone, to compare")
        local = evaluation.train_local(config, base, chosen, pools, perform)
    shared = download(state.best_adapter, config.strategy.download).adapter  # what devices have of it
    adapters = evaluation.arms(chosen, local, shared, base)
    export_adapters(folder / "adapters", base, chosen, shared)
    display.phase("measuring held-out pictures")
    losses = evaluation.losses(chosen, adapters, pools, perform)
    drawn: dict[str, Gallery] = {}
    if config.evaluation.gallery:
        display.phase("drawing the gallery")
        drawn = evaluation.gallery(config, base, chosen, adapters, memory)
    judged = judge_all(base, chosen, losses, drawn)
    report_evaluation(folder / "evaluation.json", chosen, judged)
    summary = summarise(config, len(people), state, judged, time.perf_counter() - started)
    if fleet:
        summary["fleet"] = lived(people, state, fleet)
    atomic_files.write(folder / "summary.json", json.dumps(finite(summary), indent=2, allow_nan=False).encode())
    page = folder / "report.html"
    write(
        build_report(config, base, folder / "adapters", people, chosen, state, judged, drawn, summary, command, fleet),
        page,
    )
    display.finish(summary, {"report": page, "adapters": folder / "adapters"})
    return summary


def finite(value: Any) -> Any:
    """Plain values with None for each number that isn't finite: JSON has no NaN, and nothing was measured there."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def export_adapters(folder: Path, base: Base, people: Sequence[Participant], shared: Adapter) -> None:
    """The shared adapter, and for everybody who has a personal one two files: with the shared one in it, and without.

    Each in every layout that some tool reads (`models.export.adapter_files`).
    """
    adapter_files.write(folder, "shared", shared, base, "shared")
    for person in people:
        if kept := person.device.store.personal(base.sites):
            both = concatenate([kept.shared, kept.adapter])
            adapter_files.write(folder / PERSONAL, f"{person.name}.with_shared", both, base, "shared+personal")
            adapter_files.write(folder / PERSONAL, f"{person.name}.without_shared", kept.adapter, base, "personal")


def judge_all(
    base: Base, people: Sequence[Participant], losses: Mapping[str, Mapping[str, float]], drawn: Mapping[str, Gallery]
) -> dict[str, dict[str, Judged]]:
    """Every person under every arm."""
    scores = evaluation.scores(judge.load(assets.locate("judge"), str(base.device)), people, drawn) if drawn else {}
    return {
        person.name: {
            arm: Judged(loss, *scores.get(person.name, {}).get(arm, Score()))
            for arm, loss in losses[person.name].items()
        }
        for person in people
    }


def summarise(
    config: SimulationConfig,
    clients: int,
    state: RunState,
    judged: Mapping[str, Mapping[str, Judged]],
    seconds: float,
) -> dict[str, Any]:
    """The numbers of `summary.json`; means over those who were judged."""

    def mean(field: str) -> dict[str, float | None]:
        known: dict[str, list[float]] = {}
        for one in judged.values():
            for arm, result in one.items():
                known.setdefault(arm, []).extend([] if getattr(result, field) is None else [getattr(result, field)])
        return {arm: sum(found) / len(found) if found else None for arm, found in known.items()}

    return {
        "strategy": config.strategy.aggregation,
        "rounds": config.rounds,
        "best_round": state.best_round,
        "clients": clients,
        "judged": len(judged),
        "loss": mean("loss"),
        "legibility": mean("legibility"),
        "style": mean("style"),
        **totals.run_totals(state.history),
        "seconds": seconds,
        "seed": config.seed,
        "config_hash": config_hash(config),
    }


def lived(people: Sequence[Participant], state: RunState, fleet: Sequence[FleetRound]) -> dict[str, Any]:
    """What a fleet's life came to: simulated time, energy, who was lost, and how evenly devices took part."""
    rounds = {name: facts.rounds for name, facts in state.devices.items()}
    rounds = {person.name: rounds.get(person.name, 0) for person in people}
    dropped = [record.train.dropped for record in state.history if record.train]
    return {
        "hours": fleet[-1].ended / 3600,
        "kwh": sum(facts.joules for facts in fleet) / 3.6e6,
        "battery_kwh": sum(facts.drained for facts in fleet) / 3.6e6,
        "lost": dict(sorted(sum((Counter(facts.lost) for facts in fleet), Counter[str]()).items())),
        "late": sum(counts.get("late", 0) for counts in dropped),
        "rounds": rounds,
        "gini": gini(list(rounds.values())),
    }


def report_evaluation(file: Path, people: Sequence[Participant], judged: Mapping[str, Mapping[str, Judged]]) -> None:
    """Every person's numbers, for paired comparisons."""
    rows = [
        {"name": p.name, "kind": p.kind, **{arm: dataclasses.asdict(one) for arm, one in judged[p.name].items()}}
        for p in people
    ]
    atomic_files.write(file, json.dumps(finite(rows), indent=1, allow_nan=False).encode())


def build_report(
    config: SimulationConfig,
    base: Base,
    adapters: Path,
    people: Sequence[Participant],
    chosen: Sequence[Participant],
    state: RunState,
    judged: Mapping[str, Mapping[str, Judged]],
    drawn: Mapping[str, Gallery],
    summary: dict[str, Any],
    command: str,
    fleet: Sequence[FleetRound] = (),
) -> Report:
    """The page's content."""
    rounds = totals.rows(state.history)
    for row, facts in zip(rounds, fleet, strict=False):
        row.update(joules=facts.joules, hours=facts.ended / 3600, lost=facts.lost)
    return Report(
        title=title(people),
        command=command,
        config_yaml=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
        summary=summary,
        rounds=rounds,
        devices=[device_row(person, state, judged[person.name]) for person in chosen],
        gallery=gallery([person for person in chosen if person.name in drawn], drawn),
        use=loading_snippet(base, adapters),
        strategy=config.strategy.aggregation,
        rates=rates(people, base),
        letters=all(person.kind != "own" for person in people),
        footer=f"Seed {config.seed} · configuration {summary['config_hash'][:12]}",
    )


def rates(people: Sequence[Participant], base: Base) -> str:
    """Where the devices' seconds and joules come from."""
    words = {
        False: "from the rates that their profiles state for this base",
        True: f"predicted from the operations of one training pass of this base at {base.resolution} pixels and what "
        "the devices' hardware sustains, as anther device plan does",
    }
    return "; ".join(words[kind] for kind in sorted({person.hardware.predicted for person in people}))


def device_row(person: Participant, state: RunState, judged: Mapping[str, Judged]) -> DeviceRow:
    """What one device did over all rounds; nothing, if it was never asked."""
    facts = state.devices.get(person.name, zero_metrics())
    return totals.device_row(person.name, person.profile, facts, {arm: one.loss for arm, one in judged.items()})


def gallery(people: Sequence[Participant], drawn: Mapping[str, Gallery]) -> list[GalleryRow]:
    """The rows of the page's gallery, all their pictures small enough for one page."""
    shown_of = {person.name: person.pictures.train[:GIVEN] for person in people}
    counts = (sum(map(len, drawn[name].arms.values())) + len(given) for name, given in shown_of.items())
    thumbnail = Thumbnails(sum(counts))
    return [gallery_row(person, shown_of[person.name], drawn[person.name], thumbnail) for person in people]


def gallery_row(
    person: Participant, given: Sequence[Picture], drawn: Gallery, thumbnail: Callable[[np.ndarray], Thumbnail]
) -> GalleryRow:
    """One row of the page's gallery."""
    return GalleryRow(
        name=person.name,
        kind={"hand": "handwriting", "individual": "individual design"}.get(person.kind, "own pictures"),
        given=[thumbnail(picture.at_least(SIDE)) for picture in given],
        given_captions=[shown(picture.caption) for picture in given],
        captions=[shown(caption) for caption in drawn.captions],
        arms={arm: [thumbnail(pixels) for pixels in pictures] for arm, pictures in drawn.arms.items()},
        gave=len(person.pictures.train),
    )


def title(people: Sequence[Participant]) -> str:
    """What happened, in a line."""
    learned = "pictures" if any(person.kind == "own" for person in people) else "letters"
    return f"{len(people)} {'device' if len(people) == 1 else 'devices'} learned their own {learned} together"
