"""Results of a finished run: adapters, evaluation.json, summary.json, report.html."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common import atomic_files
from conf.components import as_settings
from conf.schemas.simulation import SimulationConfig
from models.base.base import Base
from models.export import adapter_files
from models.files import assets
from models.lora.adapter import Adapter
from models.lora.directions import without_zero_rank
from server.report import totals
from server.report.page import write
from server.rounds.state import RunState
from simulations import evaluation
from simulations.evaluation import ArmScores, Gallery, Perform, Score
from simulations.fleet.outcomes import FleetRound, gini
from simulations.fleet.participants import Participant
from simulations.report.display import Display
from simulations.report.page import build_report
from simulations.run_dir import config_hash
from strategies.download import encode_download
from strategies.factory.personalization import build_personalization
from training.personalization import total_steps
from typefaces import judge

PERSONAL = "personal"  # folder of the personal adapters


def finish(
    config: SimulationConfig,
    folder: Path,
    base: Base,
    people: Sequence[Participant],
    evaluated: Sequence[Participant],
    perform: Perform,
    memory: int,
    state: RunState,
    display: Display,
    started: float,
    command: str,
    fleet: Sequence[FleetRound] = (),
) -> dict[str, Any]:
    """Train the local arm of the evaluated participants, evaluate all their arms, and write all results.

    Args:
        config: configuration of the run.
        folder: its output folder.
        base: base of the run.
        people: participants of the rounds.
        evaluated: participants to evaluate, and newcomers.
        perform: runs jobs.
        memory: bytes that jobs may take.
        state: state after the last round.
        display: shows phases and results.
        started: `time.perf_counter()` at the start of the run.
        command: command that repeats the run.
        fleet: outcomes of a timed fleet by round.

    Returns:
        The contents of `summary.json`.
    """
    pools, local = evaluation.encode_pools(evaluated, perform), None
    if config.evaluation.baseline_local:
        display.phase("training local baselines, to compare")
        shared_steps, personal_steps = config.adapter.shared.steps, config.adapter.personal.steps
        steps = total_steps(
            build_personalization(config), rounds=config.rounds, shared=shared_steps, personal=personal_steps
        )
        local = evaluation.train_local(config.adapter, base, evaluated, pools, perform, steps=steps, seed=config.seed)
    shared = encode_download(state.best_adapter, config.compression.download).adapter  # as devices have it
    adapters = evaluation.arms(evaluated, local, shared, base)
    export_adapters(folder / "adapters", base, evaluated, shared)
    display.phase("measuring held-out pictures")
    losses = evaluation.losses(evaluated, adapters, pools, perform)
    galleries: dict[str, Gallery] = {}
    if config.evaluation.gallery_size:
        display.phase("drawing the gallery")
        galleries = evaluation.gallery(config.evaluation, base, evaluated, adapters, memory=memory, seed=config.seed)
    scores = score_arms(base, evaluated, losses, galleries)
    write_evaluation(folder / "evaluation.json", evaluated, scores)
    summary = summarize(config, people, evaluated, state, scores, time.perf_counter() - started)
    if fleet:
        summary["fleet"] = fleet_summary(people, state, fleet)
    atomic_files.write(folder / "summary.json", json.dumps(nan_to_none(summary), indent=2, allow_nan=False).encode())
    page = folder / "report.html"
    adapters_folder = folder / "adapters"
    settings = yaml.safe_dump(as_settings(config), sort_keys=False)
    report = build_report(
        settings, base, adapters_folder, people, evaluated, state, scores, galleries, summary, command, fleet
    )
    write(report, page)
    display.finish(summary, {"report": page, "adapters": adapters_folder})
    return summary


def nan_to_none(value: Any) -> Any:
    """Replace each non-finite number by None, recursively: JSON has no NaN, which stands for a missing measurement."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: nan_to_none(part) for key, part in value.items()}
    return [nan_to_none(part) for part in value] if isinstance(value, list | tuple) else value


def export_adapters(folder: Path, base: Base, people: Sequence[Participant], shared: Adapter) -> None:
    """Write the shared adapter, and each personal adapter in two files: with the shared adapter included, and without.

    Each adapter is written in every layout of `models.export.adapter_files`.

    Args:
        folder: output folder.
        base: base of the adapters.
        people: people whose personal adapters are written.
        shared: the shared adapter.
    """
    adapter_files.write(folder, "shared", without_zero_rank(shared), base, "shared")
    for person in people:
        if stored := person.device.store.personal(base.sites):
            adapter_files.write(
                folder / PERSONAL, f"{person.name}.with_shared", stored.combined, base, "shared+personal"
            )
            adapter_files.write(folder / PERSONAL, f"{person.name}.without_shared", stored.adapter, base, "personal")


def score_arms(
    base: Base,
    people: Sequence[Participant],
    losses: Mapping[str, Mapping[str, float]],
    galleries: Mapping[str, Gallery],
) -> dict[str, dict[str, ArmScores]]:
    """Combine losses with the judge's scores of the galleries.

    Args:
        base: base of the run.
        people: the people to evaluate.
        losses: test losses by person and arm.
        galleries: galleries by person; empty: no pictures were generated.

    Returns:
        Scores by person and arm.
    """
    judged = {}
    if galleries:
        judged = evaluation.scores(judge.load(assets.locate("judge"), str(base.device)), people, galleries)
    return {
        person.name: {
            arm: ArmScores(loss, *judged.get(person.name, {}).get(arm, Score()))
            for arm, loss in losses[person.name].items()
        }
        for person in people
    }


def summarize(
    config: SimulationConfig,
    people: Sequence[Participant],
    evaluated: Sequence[Participant],
    state: RunState,
    scores: Mapping[str, Mapping[str, ArmScores]],
    seconds: float,
) -> dict[str, Any]:
    """Return the contents of `summary.json`.

    Args:
        config: configuration of the run.
        people: participants of the rounds.
        evaluated: people that were evaluated.
        state: state after the last round.
        scores: scores by person and arm; the summary has their means, of newcomers separately.
        seconds: duration of the run.
    """
    members = [scores[person.name] for person in evaluated if not person.newcomer]
    joined = [scores[person.name] for person in evaluated if person.newcomer]
    return {
        "strategy": config.aggregation.name,
        "rounds": config.rounds,
        "best_round": state.best_round,
        "clients": len(people),
        **mean_scores(members),
        **({"newcomers": mean_scores(joined)} if joined else {}),
        **totals.run_totals(state.history),
        "seconds": seconds,
        "seed": config.seed,
        "config_hash": config_hash(config),
    }


def mean_scores(scores: Sequence[Mapping[str, ArmScores]]) -> dict[str, Any]:
    """Return the number of people, and the mean of each score by arm; None if there is none."""
    summary: dict[str, Any] = {"judged": len(scores)}
    for field in ("loss", "legibility", "style"):
        values_by_arm: dict[str, list[float]] = {}
        for by_arm in scores:
            for arm, result in by_arm.items():
                value = getattr(result, field)
                values_by_arm.setdefault(arm, []).extend([] if value is None else [value])
        summary[field] = {arm: sum(values) / len(values) if values else None for arm, values in values_by_arm.items()}
    return summary


def fleet_summary(people: Sequence[Participant], state: RunState, fleet: Sequence[FleetRound]) -> dict[str, Any]:
    """Summarize a timed fleet: simulated time, energy, lost devices, and evenness of participation.

    Args:
        people: all participants.
        state: state after the last round.
        fleet: outcomes by round.
    """
    rounds = {name: metrics.rounds for name, metrics in state.devices.items()}
    rounds = {person.name: rounds.get(person.name, 0) for person in people}
    dropped = [record.train.dropped for record in state.history if record.train]
    return {
        "hours": fleet[-1].ended / 3600,
        "kwh": sum(outcome.joules for outcome in fleet) / 3.6e6,
        "battery_kwh": sum(outcome.drained for outcome in fleet) / 3.6e6,
        "lost": dict(sorted(sum((Counter(outcome.lost) for outcome in fleet), Counter[str]()).items())),
        "late": sum(counts.get("late", 0) for counts in dropped),
        "rounds": rounds,
        "gini": gini(list(rounds.values())),
    }


def write_evaluation(file: Path, people: Sequence[Participant], scores: Mapping[str, Mapping[str, ArmScores]]) -> None:
    """Write every person's scores as JSON, for paired comparisons.

    Args:
        file: path of `evaluation.json`.
        people: the people that were evaluated.
        scores: scores by person and arm.
    """
    rows = [
        {
            "name": p.name,
            "kind": p.kind,
            **({"role": p.role} if p.role else {}),
            **({"newcomer": True} if p.newcomer else {}),
            **{arm: dataclasses.asdict(score) for arm, score in scores[p.name].items()},
        }
        for p in people
    ]
    atomic_files.write(file, json.dumps(nan_to_none(rows), indent=1, allow_nan=False).encode())
