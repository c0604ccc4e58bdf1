"""Benchmark of aggregation rules under heterogeneity: the same writers, rounds and seeds for every rule and setting.

The *gain* is the relative reduction of the base's held-out loss by the shared adapter without the personal one. For
fedsa, whose B stays on each device, it is the reduction by both factors together, measured on the device. Each rule
uses the learning rate that was best for it on development writers (`RATES`); nothing else differs between two rows of a
setting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from bench.lib.paired import bootstrap_interval
from bench.quality.utility import run_once
from simulations.fleet.writers import slug

COMMON = (
    "evaluation.baseline_local=false",
    "evaluation.gallery_size=0",
    "cohort.eval_size=8",
    "tracker=none",
    "rounds=15",
    "adapter.shared.steps=5",
    "adapter.personal.steps=1",
    "adapter.personal.lr=1e-6",
    "adapter.shared.lr_schedule=cosine",
    "data.validation=10",
    "data.test=32",
)
SAMPLE = 20
"""Devices sampled per round, where a fleet has more."""


class HeterogeneitySetting(NamedTuple):
    """Overrides of a heterogeneity setting, and the rules and seeds that it runs."""

    overrides: tuple[str, ...]
    rules: tuple[str, ...] | None = None  # None: all rules
    writers: int = 40
    seeds: int = 1  # number of the requested seeds that are used; claims use all


EQUAL, RANKS = "adapter.shared.rank=8", "adapter.shared.rank=16"
MIXED = ("exact", "exact, by slices", "flexlora", "hetlora", "raflora", "ffa", "rolora", "fedsvd")
"""Rules that accept clients of different ranks."""
SETTINGS: Mapping[str, HeterogeneitySetting] = {
    "ranks, half the sites": HeterogeneitySetting(("fleet=ranks_halves", RANKS), MIXED, seeds=3),
    "ranks 2–16": HeterogeneitySetting(("fleet=ranks", RANKS), MIXED),
    "equal ranks": HeterogeneitySetting(("fleet=laptops", EQUAL)),
    "half the sites": HeterogeneitySetting(("fleet=halves", EQUAL), ("exact", "fedit", "ffa", "hetlora")),
    "label skew": HeterogeneitySetting(
        ("fleet=laptops", EQUAL, "data.label_skew=true"), ("exact", "fedit", "ffa", "fedsa", "fedsvd")
    ),
    "100 writers": HeterogeneitySetting(("fleet=laptops", EQUAL), ("exact", "fedit", "ffa"), writers=100),
    "8 writers": HeterogeneitySetting(("fleet=laptops", EQUAL), ("exact", "fedit", "flora", "hetlora"), writers=8),
    "ε = 8 per image": HeterogeneitySetting(
        (
            "fleet=laptops",
            EQUAL,
            "privacy=example",
            "privacy.noise_multiplicity=4",
            "data.train=20",
            "adapter.shared.batch_size=20",
            "adapter.shared.steps=1",
        ),
        ("exact", "fedit", "ffa", "fedsb"),
    ),
}
"""Fleets are defined in conf/fleet: a quarter each of rank 2, 4, 8 and 16; every second device trains only attn2."""

RULES: Mapping[str, tuple[str, ...]] = {
    "exact": ("aggregation=exact",),
    "exact, by slices": ("aggregation=exact", "aggregation.weighting=rank_slice"),
    "fedit": ("aggregation=fedit",),
    "ffa": ("aggregation=ffa",),
    "rolora": ("aggregation=rolora",),
    "fedsa": ("aggregation=fedsa",),
    "fedsvd": ("aggregation=fedsvd",),
    "fedsb": ("aggregation=fedsb",),
    "flora": ("aggregation=flora",),
    "flexlora": ("aggregation=flexlora",),
    "hetlora": ("aggregation=hetlora",),
    "raflora": ("aggregation=raflora",),
}
FEW_ONLY = ("flora",)
"""Rules for small fleets: the adapter grows each round by the sum of all ranks, so a large fleet exceeds the memory."""

RATES_TRIED = (0.003, 0.006, 0.012, 0.024)
RATES: Mapping[str, float] = {
    **dict.fromkeys(("exact", "exact, by slices", "flexlora", "hetlora", "raflora", "flora"), 0.012),
    **dict.fromkeys(("fedit", "ffa", "rolora", "fedsvd", "fedsb"), 0.024),
    "fedsa": 0.006,
}
"""Best learning rate of `RATES_TRIED` for each rule, found by `--tune`; flora uses the rate of exact."""
PRIVATE_RATE = 10.0
"""Factor on the learning rate for a private step on all pictures."""


def is_run(rule: str, setting: HeterogeneitySetting) -> bool:
    """Return whether a rule is run in a setting."""
    if setting.rules is None:
        return rule not in FEW_ONLY
    return rule in setting.rules


def command(rule: str, name: str, seed: int, rate: float, *, role: str, overrides: Sequence[str]) -> list[str]:
    """Return the command line of one federation.

    Args:
        rule: key of `RULES`.
        name: key of `SETTINGS`.
        seed: seed of the run.
        rate: learning rate before the factor for private runs.
        role: writers to use, `development` or `test`.
        overrides: further Hydra overrides.
    """
    setting = SETTINGS[name]
    scaled = rate * (PRIVATE_RATE if "privacy=example" in setting.overrides else 1.0)
    writers = min(setting.writers, 20) if role == "development" else setting.writers
    return [
        sys.executable,
        "-m",
        "simulations.run",
        *RULES[rule],
        *COMMON,
        *setting.overrides,
        f"data.role={role}",
        f"data.writers={writers}",
        *([f"cohort.size={SAMPLE}"] if writers > SAMPLE else []),
        f"adapter.shared.lr={scaled:g}",
        f"seed={seed}",
        *overrides,
    ]


def run(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a federation unless it is complete, and return losses per writer, bytes and diagnostics of the last round."""
    run_once(arguments, folder)
    evaluated = "personal" if "aggregation=fedsa" in arguments else "shared"
    rows = json.loads((folder / "evaluation.json").read_text())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "losses": {name: [row[arm]["loss"] for row in rows] for name, arm in (("base", "base"), ("shared", evaluated))},
        "bytes": summary["bytes"],
        "best_round": summary["best_round"],
        "residual": rounds[-1].get("residual"),
        "energy": rounds[-1].get("energy"),
    }


def gain(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Return the mean gain of runs over the base's mean loss, with its 95 % interval over writers."""
    base = np.concatenate([run["losses"]["base"] for run in runs])
    shared = np.concatenate([run["losses"]["shared"] for run in runs])
    low, high = bootstrap_interval(base - shared)
    return tuple(float(value / base.mean()) for value in ((base - shared).mean(), low, high))  # type: ignore[return-value]


def measure(
    rules: Sequence[str],
    settings: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int,
    runs: Path,
    overrides: Sequence[str],
) -> list[dict[str, Any]]:
    """Run every rule in every setting, and return one record for each pair with all its runs.

    Args:
        rules: keys of `RULES`.
        settings: keys of `SETTINGS`.
        seeds: seeds; a setting uses the first `seeds` of them.
        jobs: runs that are executed in parallel.
        runs: folder for the runs.
        overrides: further Hydra overrides.
    """
    cells = [(rule, name) for name in settings for rule in rules if is_run(rule, SETTINGS[name])]
    work = [(rule, name, seed) for rule, name in cells for seed in seeds[: SETTINGS[name].seeds]]

    def run_one(rule: str, name: str, seed: int) -> dict[str, Any]:
        folder = runs / "aggregators" / slug(name) / f"{slug(rule)}-{seed}"
        arguments = command(rule, name, seed, RATES[rule], role="test", overrides=overrides)
        return {"seed": seed, **run(arguments, folder)}

    results_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for (rule, name, _), result in zip(work, pool.map(lambda which: run_one(*which), work), strict=True):
            results_of.setdefault((rule, name), []).append(result)
    return [
        {"rule": rule, "setting": name, "rate": RATES[rule], "gain": gain(results), "runs": results}
        for (rule, name), results in results_of.items()
    ]


def tune(rules: Sequence[str], *, jobs: int, runs: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Measure the gain of every rule at every learning rate, on development writers with equal ranks.

    Args:
        rules: keys of `RULES`.
        jobs: runs that are executed in parallel.
        runs: folder for the runs.
        overrides: further Hydra overrides.
    """
    work = [(rule, rate) for rule in rules if rule not in FEW_ONLY for rate in RATES_TRIED]

    def run_one(rule: str, rate: float) -> dict[str, Any]:
        arguments = command(rule, "equal ranks", 0, rate, role="development", overrides=overrides)
        return run(arguments, runs / "tune" / f"{slug(rule)}-{rate:g}")

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda which: run_one(*which), work))
    return [
        {"rule": rule, "rate": rate, "gain": gain([result])} for (rule, rate), result in zip(work, results, strict=True)
    ]


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each rule and a column for each setting."""
    settings = list(dict.fromkeys(record["setting"] for record in records))
    shown = Table(title="Gain of the shared adapter, % of the base's held-out loss [95 %]; best of a setting in bold")
    shown.add_column("rule")
    for name in settings:
        shown.add_column(name, justify="right")
    best = {name: max(record["gain"][0] for record in records if record["setting"] == name) for name in settings}
    for rule in dict.fromkeys(record["rule"] for record in records):
        cells = {record["setting"]: record["gain"] for record in records if record["rule"] == rule}
        shown.add_row(rule, *(_cell(cells.get(name), best[name]) for name in settings))
    return shown


def _cell(gain: Sequence[float] | None, best: float) -> str:
    if gain is None:
        return ""
    mean, low, high = gain
    text = f"{100 * mean:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"[bold]{text}[/bold]" if mean == best else text


def rate_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each rule and a column for each learning rate."""
    shown = Table(title="Gain on development writers, % of the base's held-out loss, by learning rate")
    shown.add_column("rule")
    for rate in RATES_TRIED:
        shown.add_column(f"{rate:g}", justify="right")
    for rule in dict.fromkeys(record["rule"] for record in records):
        cells = {record["rate"]: record["gain"][0] for record in records if record["rule"] == rule}
        shown.add_row(rule, *(f"{100 * cells[rate]:.2f}" for rate in RATES_TRIED))
    return shown
