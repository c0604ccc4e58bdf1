"""Benchmark of selection, planning and round timing on simulated fleets: hours, kWh and flat batteries.

Every run trains until long after the *target*: 80 % of the gain that the same writers reach if every device takes part
in every round without limits. The cost of a run is counted until the first round whose measured gain reaches the
target. All runs of a fleet use the same writers, devices, seeds, learning rate and aggregation rule.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.quality.utility import run_once

TARGET_SHARE = 0.8
DEVICES, COHORT_SIZE = 40, 8
COMMON = (
    "evaluation.baseline_local=false",
    "evaluation.gallery_size=0",
    "evaluation.devices=1",
    "cohort.eval_size=20",
    "tracker=none",
    "aggregation=exact",
    "adapter.shared.rank=8",
    "adapter.shared.lr=0.006",
    "adapter.personal.steps=1",
    "data.validation=10",
)
REFERENCE = ("fleet=laptops", "rounds=30", "adapter.shared.steps=5")
RANDOM = ("selection=random", "planning=full", f"cohort.size={COHORT_SIZE}")


class FleetPlan(NamedTuple):
    """Plan of every device, and the requirements for devices."""

    steps: int
    memory_gib: float | None
    """Minimum memory of a device in GiB; None: any."""
    timeout: int
    """Seconds after which a round ends."""
    sites: str | None = None
    """Regular expression of the adapter's sites; None: all sites."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """Hydra overrides of the plan."""
        result: tuple[str, ...] = (f"adapter.shared.steps={self.steps}", f"round_loop.timeout={self.timeout}")
        if self.memory_gib is not None:
            result += (f"cohort.eligibility.min_memory_gib={self.memory_gib:g}",)
        return result if self.sites is None else (*result, f"adapter.sites={self.sites}")


GRID = tuple(
    FleetPlan(steps, memory, timeout, sites)
    for steps, memory, timeout, sites in itertools.product(
        (2, 5, 10), (None, 1.7, 3.5, 3.9), (1800, 3600), (None, "up_blocks.*attn.*to_.*")
    )
    if not (steps == 10 and timeout == 1800)
)
"""Plans for random selection on the week's fleet. A memory above 1.7 GiB excludes the boards that can't hold a pass,
above 3.5 also the small phones, above 3.9 all but three device types."""

ASYNC_ROUNDS = "rounds=32"  # for asynchronous runs, whose rounds are short
AWARE = (
    "planning=device",
    "cohort.eligibility.idle=true",
    "cohort.eligibility.min_battery=0.4",
    "cohort.eligibility.cool=true",
)
"""Excludes devices that can't train at the moment or should not."""
WEEK: Mapping[str, tuple[str, ...]] = {
    "thrifty, short rounds": (
        *AWARE,
        "selection=energy_delay",
        "selection.candidate_factor=2",
        f"cohort.size={COHORT_SIZE}",
        "adapter.shared.steps=3",
        "round_loop.timeout=1000",
        "planning.deadline=800",
    ),
    "energy-aware, over-selection": (
        *AWARE,
        "selection=eafl",
        "selection.utility_weight=0",
        f"cohort.size={COHORT_SIZE}",
        "cohort.overselection=1.25",
        "adapter.shared.steps=5",
        "round_loop.timeout=1400",
        "planning.deadline=1200",
    ),
    "thrifty, asynchronous": (
        *AWARE,
        "selection=energy_delay",
        "selection.candidate_factor=2",
        "round_loop=async",
        f"round_loop.buffer_size={COHORT_SIZE}",
        "round_loop.concurrency=24",
        "adapter.shared.steps=3",
        "planning.deadline=1300",
        f"cohort.size={COHORT_SIZE}",
        ASYNC_ROUNDS,
    ),
}
"""Arms that are compared with random selection under the best single plan."""

SPREAD: Mapping[str, tuple[str, ...]] = {
    "wait for all": (f"cohort.size={COHORT_SIZE}", "round_loop.timeout=86400"),
    "deadline, over-selection": (f"cohort.size={COHORT_SIZE}", "cohort.overselection=1.5", "round_loop.timeout=3600"),
    "asynchronous": ("round_loop=async", "round_loop.buffer_size=8", "round_loop.concurrency=24", ASYNC_ROUNDS),
    "thrifty": (
        f"cohort.size={COHORT_SIZE}",
        "selection=energy_delay",
        "selection.candidate_factor=3",
        "planning=device",
        "round_loop.timeout=86400",
    ),
}
"""Round timing and selection for a fleet whose slowest device takes ten times as long as its fastest."""

ROUNDS: Mapping[str, tuple[str, ...]] = {"week": ("rounds=24",), "spread": ("rounds=24",), "grid": ("rounds=40",)}
BEST_PLANS = {"random, fastest plan": FleetPlan(5, 3.9, 1800), "random, least energy": FleetPlan(5, None, 3600)}
"""Plans of the grid that took the fewest hours and the fewest kWh on development writers."""


class TargetCost(NamedTuple):
    """Cost of a run until its gain reached the target; `hours` and `kwh` are None if it did not."""

    hours: float | None
    kwh: float | None
    battery_kwh: float | None
    """Energy from batteries, a part of `kwh`."""
    round: int | None
    lost: Mapping[str, int]
    """Devices that never replied, by reason, until the target or else until the end."""
    gini: float
    best: float


def round_gains(folder: Path) -> list[dict[str, Any]]:
    """Return for each measured round its gain, and the hours, kWh and lost devices until then."""
    rows, joules, drained, lost = [], 0.0, 0.0, Counter[str]()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        joules += row.get("fleet_joules", 0.0)
        drained += row.get("battery_joules", 0.0)
        lost.update({key.removeprefix("lost/"): n for key, n in row.items() if key.startswith("lost/")})
        if row.get("base") is not None:
            gain = 1 - row["shared"] / row["base"]
            rows.append(
                {
                    "round": row["round"],
                    "gain": gain,
                    "hours": row.get("hours", 0.0),
                    "kwh": joules / 3.6e6,
                    "battery_kwh": drained / 3.6e6,
                    "lost": dict(lost),
                }
            )
    return rows


def target_cost(folder: Path, target: float) -> TargetCost:
    """Return the cost of a completed run until it reached the target."""
    rows = round_gains(folder)
    first: dict[str, Any] = next((row for row in rows if row["gain"] >= target), {})
    fleet = json.loads((folder / "summary.json").read_text()).get("fleet", {})
    return TargetCost(
        hours=first.get("hours"),
        kwh=first.get("kwh"),
        battery_kwh=first.get("battery_kwh"),
        round=first.get("round"),
        lost=(first or rows[-1])["lost"],
        gini=fleet.get("gini", 0.0),
        best=max(row["gain"] for row in rows),
    )


def command(overrides: Sequence[str], *, role: str, seed: int) -> list[str]:
    """Return the command line of one federation.

    Args:
        overrides: Hydra overrides of the run.
        role: writers to use, `development` or `test`.
        seed: seed of the run.
    """
    writers = 20 if role == "development" else DEVICES
    return [
        sys.executable,
        "-m",
        "simulations.run",
        *COMMON,
        *overrides,
        f"data.role={role}",
        f"data.writers={writers}",
        f"data.devices={DEVICES}",
        f"seed={seed}",
    ]


def run_arms(
    work: Sequence[tuple[str, Sequence[str], int]], *, role: str, jobs: int, runs: Path, overrides: Sequence[str]
) -> list[TargetCost]:
    """Run federations, and return the cost of each until its seed's target.

    Args:
        work: runs as (name, overrides, seed).
        role: writers to use, `development` or `test`.
        jobs: runs that are executed in parallel.
        runs: folder for the runs.
        overrides: further Hydra overrides of every run.
    """
    seeds = sorted({seed for *_, seed in work})
    all_runs = [*((f"reference-{seed}", REFERENCE, seed) for seed in seeds), *((f"{n}-{s}", o, s) for n, o, s in work)]

    def run_one(name: str, arm: Sequence[str], seed: int) -> Path:
        folder = runs / role / name
        run_once(command([*arm, *overrides], role=role, seed=seed), folder)
        return folder

    with ThreadPoolExecutor(jobs) as pool:
        folders = list(pool.map(lambda which: run_one(*which), all_runs))
    targets = {
        seed: TARGET_SHARE * max(row["gain"] for row in round_gains(folder))
        for seed, folder in zip(seeds, folders[: len(seeds)], strict=True)
    }
    return [target_cost(folder, targets[seed]) for (*_, seed), folder in zip(work, folders[len(seeds) :], strict=True)]


def table(title: str, runs_of: Mapping[str, Sequence[TargetCost]], first: str) -> Table:
    """Return a table with a row for each arm: medians over its seeds, and ratios to the same seed's run of one arm.

    Args:
        title: title of the table.
        runs_of: runs by arm.
        first: arm that the ratios refer to.
    """
    shown = Table(title=title)
    for name in (
        "arm",
        "reached",
        "rounds",
        "hours",
        "×",
        "kWh",
        "×",
        "from batteries",
        "lost",
        "Gini",
        "best gain, %",
    ):
        shown.add_column(name, justify="left" if name in ("arm", "lost") else "right")
    base = runs_of[first]
    for name, runs in runs_of.items():
        lost = sum((Counter(run.lost) for run in runs), Counter())
        shown.add_row(
            name,
            f"{sum(run.round is not None for run in runs)} of {len(runs)}",
            _middle(runs, "round", 0),
            _middle(runs, "hours", 1),
            _ratio(runs, base, "hours"),
            _middle(runs, "kwh", 3),
            _ratio(runs, base, "kwh"),
            _middle(runs, "battery_kwh", 3),
            ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items())) or "none",
            f"{median(run.gini for run in runs):.2f}",
            f"{100 * median(run.best for run in runs):.1f}",
        )
    return shown


def median_or_none(runs: Sequence[TargetCost], key: str) -> float | None:
    """Return the median over runs; None if a run never reached the target."""
    values = [getattr(run, key) for run in runs]
    return None if None in values else median(values)


def _middle(runs: Sequence[TargetCost], key: str, digits: int) -> str:
    value = median_or_none(runs, key)
    return "—" if value is None else f"{value:.{digits}f}"


def _ratio(runs: Sequence[TargetCost], base: Sequence[TargetCost], key: str) -> str:
    value = median_ratio([getattr(run, key) for run in runs], [getattr(run, key) for run in base])
    return "—" if value is None else f"{value:.2f}"


def median_ratio(values: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """Return the median over seeds of the ratio to the other run of the same seed; None if a run missed the target.

    A seed has its own writers, devices and target: runs of different seeds differ more than arms do.
    """
    pairs = [(a, b) for a, b in zip(values, others, strict=True) if a is not None and b]
    return median(a / b for a, b in pairs) if len(pairs) == len(values) else None


def measure(
    which: Sequence[str],
    *,
    role: str,
    seeds: Sequence[int],
    jobs: int,
    runs: Path,
    overrides: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Run the arms of some fleets, print their tables, and return their numbers.

    Args:
        which: fleets: `week`, `spread` or `grid`.
        role: writers to use, `development` or `test`.
        seeds: seeds of the runs.
        jobs: runs that are executed in parallel.
        runs: folder for the runs.
        overrides: further Hydra overrides.
        console: prints the tables.
    """
    common: dict[str, Any] = {"role": role, "jobs": jobs, "runs": runs, "overrides": overrides}
    record: dict[str, Any] = {}
    for fleet in which:
        arms = {
            "week": {**{name: (*RANDOM, *plan.overrides) for name, plan in BEST_PLANS.items()}, **WEEK},
            "spread": SPREAD,
            "grid": {str(plan): (*RANDOM, *plan.overrides) for plan in GRID},
        }[fleet]
        on = f"fleet={'week' if fleet == 'grid' else fleet}"
        work = [
            (f"{fleet}-{index}", (on, *ROUNDS[fleet], *arm), seed)
            for index, arm in enumerate(arms.values())
            for seed in seeds
        ]
        results = iter(run_arms(work, **common))
        by_arm = {name: [next(results) for _ in seeds] for name in arms}
        console.print(table(f"fleet={fleet}: to {TARGET_SHARE:.0%} of the reference gain", by_arm, next(iter(arms))))
        record[fleet] = {name: [run._asdict() for run in runs_of_arm] for name, runs_of_arm in by_arm.items()}
    return record
