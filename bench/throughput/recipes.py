"""Wall-clock time of whole federations on a CPU.

    anther bench recipes [--repeats 3] [--forms cohort serial …]

Runs the same workload as whole programs, including start-up: 20 clients, 10 rounds, 4 steps of DP-SGD with an expected
4 of 20 examples, on the glyph base, whose latents and text embeddings are computed before the timing starts.

    cohort     anther simulate grid=cohort, with its ledger and checkpoints, until its last round
    serial     the same with grid=serial: one client at a time
    published  the libraries' documented recipes, on Flower's Ray simulation (bench/throughput/ray_recipe.py)
    tuned      the same with changes that a careful user would make

Anther's simulation caches latents in its first round. One simulation therefore runs that round in advance. A copy of it
is resumed and timed, for the same number of rounds as the other forms. Forms take turns, since the speed of machines
drifts; results are medians over repeats of the ratio within a repeat.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions

FORMS = ("cohort", "serial", "published", "tuned")
TARGETS = {"published": ("total", 5.0), "tuned": ("total", 1.5), "serial": ("round", 1.3)}
CLIENTS, EXAMPLES, STEPS, BATCH = 20, 20, 4, 4
OURS = (
    "privacy=example",
    "aggregation=fedit",
    "tracker=none",
    f"data.writers={CLIENTS}",
    f"data.train={EXAMPLES}",
    f"adapter.shared.steps={STEPS}",
    f"adapter.shared.batch_size={BATCH}",
    "data.validation=1",
    "data.test=1",
    "cohort.eval_size=1",
    "evaluation.timesteps=1",
    "evaluation.gallery_size=0",
)
_POLL_SECONDS = 0.02  # seconds between two reads of a run's metrics


class RecipeTiming(NamedTuple):
    """Seconds of one program."""

    startup: float  # until training begins
    rounds: list[float]

    @property
    def total(self) -> float:
        """Seconds until the last round ends."""
        return self.startup + sum(self.rounds)

    @property
    def round(self) -> float:
        """Seconds of a round in steady state: the median without the first round."""
        return statistics.median(self.rounds[1:])


def run_simulation(form: str, rounds: int, folder: Path) -> RecipeTiming:
    """Resume a copy of a simulation after its first round, and time it until its last.

    Args:
        form: `cohort` or `serial`.
        rounds: number of timed rounds.
        folder: folder for the simulations.
    """
    prepared = folder / form
    command = [sys.executable, "-m", "simulations.run", *OURS, f"grid={form}", f"rounds={1 + rounds}"]
    if not prepared.exists():
        run_until_round([*command, f"hydra.run.dir={prepared}"], prepared, 1)
    resumed = folder / "resumed"
    shutil.copytree(prepared, resumed)
    total = run_until_round([*command, f"hydra.run.dir={resumed}", "resume=true"], resumed, 1 + rounds)
    seconds = [line["seconds"] for line in read_metrics(resumed)[2:]]
    shutil.rmtree(resumed)
    return RecipeTiming(total - sum(seconds), seconds)


def run_until_round(command: Sequence[str], folder: Path, round: int) -> float:
    """Run a simulation until a round is complete, then terminate it.

    Args:
        command: command line of the simulation.
        folder: its output folder.
        round: round to wait for.

    Returns:
        Seconds since its start.

    Raises:
        RuntimeError: the simulation exited before that round.
    """
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while (complete := len(read_metrics(folder))) <= round:
                if process.poll() is not None:
                    last = f"round {complete - 1}" if complete else "no round"
                    raise RuntimeError(f"the simulation ended with {process.returncode} after {last}")
                time.sleep(_POLL_SECONDS)
            return time.perf_counter() - started
        finally:
            process.terminate()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of every complete round; the first line is that of round 0, which has no training."""
    file = folder / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_ray_recipe(form: str, rounds: int) -> RecipeTiming:
    """Run Flower's recipe, and read the times from its last line of output."""
    command = [sys.executable, "-m", "bench.throughput.ray_recipe", "--form", form, "--rounds", str(rounds)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    times = json.loads(process.stdout.strip().splitlines()[-1])
    return RecipeTiming(times["startup"], times["rounds"])


def compare(runs: Mapping[str, Sequence[RecipeTiming]]) -> dict[str, dict[str, float]]:
    """Compute each form's time over the cohort's: in total, and for a round in steady state."""
    return {
        form: {
            "total": statistics.median(a.total / b.total for a, b in zip(form_runs, runs["cohort"], strict=True)),
            "round": statistics.median(a.round / b.round for a, b in zip(form_runs, runs["cohort"], strict=True)),
        }
        for form, form_runs in runs.items()
        if form != "cohort"
    }


def table(runs: Mapping[str, Sequence[RecipeTiming]]) -> Table:
    """Return a table with a row for each form."""
    ratios = compare(runs)
    shown = Table(title=f"{CLIENTS} clients × {STEPS} steps × {BATCH} examples, DP, glyph base; seconds (medians)")
    for heading in ("form", "start-up", "first round", "a later round", "total", "× cohort, total", "× cohort, round"):
        shown.add_column(heading, justify="left" if heading == "form" else "right")
    for form, form_runs in runs.items():
        columns = zip(*((r.startup, r.rounds[0], r.round, r.total) for r in form_runs), strict=True)
        cells = [f"{statistics.median(column):.1f}" for column in columns]
        wanted, least = TARGETS.get(form, ("", 0.0))
        for kind in ("total", "round"):
            target = f" (≥ {least})" if kind == wanted else ""
            cells.append(f"{ratios[form][kind]:.2f}{target}" if form in ratios else "")
        shown.add_row(form, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/recipes-cpu.json"))
    arguments = parser.parse_args()
    forms = list(dict.fromkeys(("cohort", *arguments.forms)))
    runs: dict[str, list[RecipeTiming]] = {form: [] for form in forms}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            turn = repeat % len(forms)
            for form in (*forms[turn:], *forms[:turn]):
                is_simulation = form in ("cohort", "serial")
                run = (
                    run_simulation(form, arguments.rounds, Path(folder))
                    if is_simulation
                    else run_ray_recipe(form, arguments.rounds)
                )
                runs[form].append(run)
                print(f"repeat {repeat + 1}, {form}: {run.total:.1f} s", file=sys.stderr)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.throughput.recipes", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "diffusers", "flwr", "ray", "opacus", "peft"),
        "settings": {"clients": CLIENTS, "rounds": arguments.rounds, "overrides": OURS},
        "slower": compare(runs),
        "runs": {
            form: [{**run._asdict(), "total": run.total} for run in form_runs] for form, form_runs in runs.items()
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=130).print(table(runs))


if __name__ == "__main__":
    main()
