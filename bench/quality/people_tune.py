"""Choose the settings of `anther bench people` on development people.

Local training with the headline's numbers of letters: rates at both sets of sites, then one change at a time from the
best (rank, rate, penalty, prior preservation, stopping by validation letters), twice. Other numbers of letters take the
settings of the nearest one, with a rate of their own.

Federations: every combination of a grid; members are the development people and all extra ones. The score is the mean
loss on the development people's held-out letters, with personal adapters, and for private runs without them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench.quality.people_plan import SHARED_ONLY, PeopleExperiment
from bench.quality.people_results import losses, measured
from bench.quality.people_settings import LocalSettings, PeopleSettings
from bench.quality.people_work import Workers
from common.errors import AntherError

RATES = {"attention": (5e-4, 1e-3, 2e-3, 4e-3), "linear": (2.5e-4, 5e-4, 1e-3, 2e-3)}
"""First rates of training without others, by sites: more sites need lower ones. Convolutions, whose adapters can't
share a pass cheaply, are left out."""
PARTS = ("federation", "local", "private")
GRID = ("adapter.personal.rank=4,8", "adapter.personal.lr=0.0004,0.0008")
FACTORS = (0.5, 1.0, 2.0)  # of a rate
Scores = list[dict[str, Any]]


def combinations(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every combination of `key=value,value,…`."""
    parts = [(word.partition("=")[0], word.partition("=")[2].split(",")) for word in grid]
    return [
        tuple(f"{key}={value}" for (key, _), value in zip(parts, values, strict=True))
        for values in itertools.product(*(values for _, values in parts))
    ]


def variations(best: LocalSettings) -> list[LocalSettings]:
    """Return settings that differ from the best in one field."""
    changes: list[dict[str, Any]] = [
        *({"rank": rank} for rank in (4, 16, 64)),
        *({"lr": best.lr * factor} for factor in (0.7, 1.4)),
        *({"proximal": strength} for strength in (1e-3, 1e-2)),
        *({"prior": weight} for weight in (0.3, 1.0)),
        {"validated": not best.validated},
    ]
    return [setting for change in changes if (setting := replace(best, **change)) != best]


def best_local(records: Iterable[tuple[LocalSettings, Mapping[str, Any]]]) -> tuple[LocalSettings, float]:
    """Return the setting with the lowest mean loss, with its best number of steps, and this loss.

    Args:
        records: each setting with its record of `people_work.run_local`.
    """
    found = []
    for setting, record in records:
        curve = np.mean(record["curve"], axis=0)
        step = int(curve.argmin())
        loss = float(np.mean(record["stopped"])) if setting.validated else float(curve[step])
        found.append((replace(setting, steps=max(1, record["steps"][step])), loss))
    return min(found, key=lambda pair: pair[1])


def tune_local(
    experiment: PeopleExperiment,
    workers: Workers,
    headline: Sequence[int],
    others: Sequence[int] = (),
    *,
    changes: int = 2,
) -> tuple[dict[str, LocalSettings], Scores]:
    """Tune training without others for each number of letters.

    Args:
        experiment: development people.
        workers: processes that run everything.
        headline: numbers of training letters that are searched.
        others: numbers of letters that take over settings, except for the rate.
        changes: rounds of single changes.

    Returns:
        The best settings by number of letters, and all scores.
    """
    first = [LocalSettings(sites=sites, lr=rate) for sites, rates in RATES.items() for rate in rates]
    best: dict[int, tuple[LocalSettings, float]] = {}
    candidates = dict.fromkeys(headline, first)
    scores: Scores = []
    for number in range(changes + 1):
        found, scored = _compare_local(experiment, workers, candidates, f"tune-local-{number}")
        scores += scored
        for n, pair in found.items():
            best[n] = min(pair, best.get(n, pair), key=lambda candidate: candidate[1])
        candidates = {n: variations(setting) for n, (setting, _) in best.items()}
    chosen = {str(n): setting for n, (setting, _) in best.items()}
    starts = {n: replace(experiment.settings, local=chosen).local_for(n) for n in others if str(n) not in chosen}
    rates = {n: [replace(start, lr=start.lr * factor) for factor in FACTORS] for n, start in starts.items()}
    found, scored = _compare_local(experiment, workers, rates, "tune-local-rates")
    return chosen | {str(n): setting for n, (setting, _) in found.items()}, scores + scored


def _compare_local(
    experiment: PeopleExperiment, workers: Workers, candidates: Mapping[int, Sequence[LocalSettings]], name: str
) -> tuple[dict[int, tuple[LocalSettings, float]], Scores]:
    """Train development people under candidate settings.

    Args:
        experiment: development people.
        workers: processes that run everything.
        candidates: settings by number of letters.
        name: name of the results.

    Returns:
        The best setting of each number of letters with its loss, and all scores.
    """
    experiment = replace(experiment, settings=replace(experiment.settings, every=2 * experiment.settings.every))
    started = []
    for n, settings in candidates.items():
        for sites in dict.fromkeys(setting.sites for setting in settings):
            chosen = [setting for setting in settings if setting.sites == sites]
            task = experiment.local(n, experiment.seeds[0], chosen, experiment.total_steps(n), grid=True)
            started.append((n, chosen, workers.local(f"{name}-{n}-{sites}", task)))
    records: dict[int, list[tuple[LocalSettings, Mapping[str, Any]]]] = {}
    for n, chosen, future in started:
        records.setdefault(n, []).extend(zip(chosen, future.result(), strict=True))
    scores = [
        {"letters": n, **asdict(setting), "loss": loss}
        for n, pairs in records.items()
        for setting, loss in (best_local([pair]) for pair in pairs)
    ]
    return {n: best_local(pairs) for n, pairs in records.items()}, scores


def tune_federation(
    experiment: PeopleExperiment, workers: Workers, letters: Sequence[int], grid: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], Scores]:
    """Tune the federation for each number of letters.

    Args:
        experiment: development people.
        workers: processes that run everything.
        letters: numbers of training letters.
        grid: `key=value,value,…` for each key.

    Returns:
        The best overrides by number of letters, and all scores.
    """
    started = {
        (n, words): workers.federation(experiment.federation(f"tune-{n}-{number}", n, experiment.seeds[0], words))
        for n in letters
        for number, words in enumerate(combinations(grid))
    }
    scores: Scores = []
    for (n, words), future in started.items():
        scores.append({"letters": n, "overrides": list(words), **mean_losses(future, ("base", "shared", "personal"))})
    chosen = {}
    for n in letters:
        best = min((row for row in scores if row["letters"] == n), key=lambda row: row["personal"])
        chosen[str(n)] = tuple(best["overrides"])
    return chosen, scores


def tune_private(
    experiment: PeopleExperiment, workers: Workers, letters: int, factors: Sequence[float] = FACTORS
) -> tuple[PeopleSettings, Scores]:
    """Tune the learning rate of the reference and of each private run; return the settings with them, and all scores.

    Args:
        experiment: development people.
        workers: processes that run everything.
        letters: training letters of each person.
        factors: factors of the rates in the settings.
    """
    forms = {"reference": experiment.settings.reference, **experiment.settings.private}
    started = {}
    for form, words in forms.items():
        changes = dict.fromkeys(scaled_rate(words, factor) for factor in factors)
        for number, changed in enumerate(changes):
            run = experiment.run(f"tune-{form}-{number}", letters, experiment.seeds[0], [*changed, *SHARED_ONLY])
            started[form, changed] = workers.federation(run)
    scores: Scores = []
    for (form, changed), future in started.items():
        scores.append({"form": form, "overrides": list(changed), **mean_losses(future, ("base", "shared"))})
    best = {
        form: tuple(min((row for row in scores if row["form"] == form), key=lambda row: row["shared"])["overrides"])
        for form in forms
    }
    reference = best.pop("reference")
    return replace(experiment.settings, reference=reference, private=best), scores


def mean_losses(future: Future[dict[str, Any]], arms: Sequence[str]) -> dict[str, float]:
    """Return the mean loss of each arm; all are infinite if the run failed, as with too high a rate."""
    try:
        run = future.result()
    except AntherError:
        return dict.fromkeys(arms, math.inf)
    return {arm: float(losses([run], measured(run), arm).mean()) for arm in arms}


def scaled_rate(words: Sequence[str], factor: float) -> tuple[str, ...]:
    """Multiply the learning rate among overrides by a factor."""
    key = "adapter.shared.lr="
    return tuple(
        f"{key}{float(word.removeprefix(key)) * factor:.6g}" if word.startswith(key) else word for word in words
    )


def tune(
    experiment: PeopleExperiment,
    workers: Workers,
    parts: Sequence[str],
    *,
    grid: Sequence[str] = GRID,
    letters: Sequence[int] = (1, 2, 5, 10, 20),
    headline: Sequence[int] = (5, 2),
    changes: int = 2,
) -> tuple[PeopleSettings, dict[str, Scores]]:
    """Tune some parts of the settings; return all settings, and the scores by part.

    The federation comes first: training without others gets as many steps as its members.

    Args:
        experiment: development people, with the settings so far.
        workers: processes that run everything.
        parts: names from `PARTS`.
        grid: grid of the federation.
        letters: further numbers of letters of training without others.
        headline: numbers of letters of federations; the first is that of private runs.
        changes: rounds of single changes of training without others.
    """
    settings, scores = experiment.settings, {}
    if "federation" in parts:
        chosen, scores["federation"] = tune_federation(experiment, workers, headline, grid)
        settings = replace(settings, by_letters={**settings.by_letters, **chosen})
    if "local" in parts:
        tuned_so_far = replace(experiment, settings=settings)
        best, scores["local"] = tune_local(tuned_so_far, workers, headline, letters, changes=changes)
        settings = replace(settings, local={**settings.local, **best})
    if "private" in parts:
        tuned, scores["private"] = tune_private(experiment, workers, headline[0])
        settings = replace(settings, reference=tuned.reference, private=tuned.private)
    return settings, scores
