"""Seconds from the start of a process until its first training step ends, by phase.

    anther bench startup [--repeats 5]

    anther  anther simulate preset=quick: configuration, fleet, strategy and round included
    script  one training step on the same base as a script of diffusers and peft does
    torch   import torch, which is part of both

The programs take turns; reported are medians over repeats. A first run of each is not counted: it compiles Python's
files and brings them into memory. CPU seconds are less sensitive to other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.throughput.first_step import PROGRAMS

OUT = Path("bench/results/startup.json")
MAX_SECONDS = 6.0  # wall seconds until the end of the simulation's first step, on two idle cores
CHILD = "from bench.throughput.first_step import main; main()"

Ends = Mapping[str, Sequence[float]]
"""CPU and wall seconds at the end of each phase, in order."""


def run_program(name: str) -> Ends:
    """Run one of `PROGRAMS` in its own process, and return the ends of its phases.

    Raises:
        RuntimeError: it ended before its last phase.
    """
    with tempfile.TemporaryDirectory(prefix="anther-") as folder:
        command = [sys.executable, "-c", CHILD, name, str(time.monotonic()), f"{folder}/run"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # compile the files once, as for users
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode or not process.stdout:
        raise RuntimeError(f"{name} ended with {process.returncode} before its last phase: {process.stderr[-2000:]}")
    ends: Ends = json.loads(process.stdout.splitlines()[-1])
    return ends


def durations(runs: Sequence[Ends]) -> dict[str, tuple[float, float]]:
    """Return the median CPU and wall seconds of each phase, and of their sum as `total`."""
    by_phase: dict[str, list[tuple[float, float]]] = {}
    for ends in runs:
        cpu = wall = 0.0
        for phase, (cpu_end, wall_end) in ends.items():
            by_phase.setdefault(phase, []).append((cpu_end - cpu, wall_end - wall))
            cpu, wall = cpu_end, wall_end
        by_phase.setdefault("total", []).append((cpu, wall))
    return {phase: (median(cpus), median(walls)) for phase, (cpus, walls) in _columns(by_phase)}


def _columns(by_phase: Mapping[str, list[tuple[float, float]]]) -> list[tuple[str, list[tuple[float, ...]]]]:
    return [(phase, list(zip(*pairs, strict=True))) for phase, pairs in by_phase.items()]


def table(runs: Mapping[str, Sequence[Ends]]) -> Table:
    """Return a table with the phases of every program."""
    shown = Table(title="from the start of the process to its first training step")
    for heading in ("program", "phase", "CPU, s", "wall, s"):
        shown.add_column(heading, justify="left" if heading in ("program", "phase") else "right")
    for name, results in runs.items():
        for phase, (cpu, wall) in durations(results).items():
            shown.add_row(name, phase, f"{cpu:.2f}", f"{wall:.2f}", end_section=phase == "total")
    total = durations(runs["anther"])["total"][1]
    shown.caption = f"anther: {total:.1f} s ≤ {MAX_SECONDS:g} s: {'yes' if total <= MAX_SECONDS else 'no'}"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    runs: dict[str, list[Ends]] = {name: [] for name in PROGRAMS}
    for repeat in range(1 + args.repeats):
        for name, counted in runs.items():
            ends = run_program(name)
            if repeat:
                counted.append(ends)
    record: dict[str, Any] = {
        "command": " ".join(["python -m bench.throughput.startup", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "diffusers", "transformers", "peft", "flwr", "hydra-core"),
        "load": os.getloadavg()[0],
        "seconds": {
            name: {phase: {"cpu": cpu, "wall": wall} for phase, (cpu, wall) in durations(results).items()}
            for name, results in runs.items()
        },
        "runs": runs,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=110).print(table(runs))


if __name__ == "__main__":
    main()
