"""Gain of a federation over training without others.

    anther bench federation [--seeds 0 1 2] [key=value …]

Runs `simulations.run preset=claim` once for each seed, and compares arms on the writers' held-out letters, paired over
writers: shared with base, personal with shared, personal with base, and personal with local (the same device without
the federation). A gain is L_base − L_arm. An interval is a 95 % percentile bootstrap over writers of the mean
difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.paired import bootstrap_interval

PAIRS = (("shared", "base"), ("personal", "shared"), ("personal", "base"), ("personal", "local"))


def compare(losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compare pairs of arms; `losses` maps an arm to its held-out losses `[writers]`."""
    result: dict[str, Any] = {"loss": {arm: float(values.mean()) for arm, values in losses.items()}}
    for better, worse in PAIRS:
        difference = losses[worse] - losses[better]
        result[f"{better} < {worse}"] = {
            "mean": float(difference.mean()),
            "interval": bootstrap_interval(difference),
            "writers": float((difference > 0).mean()),
        }
    gains = {arm: result["loss"]["base"] - result["loss"][arm] for arm in ("local", "shared", "personal")}
    return {**result, "gain": gains, "personal gain / local gain": gains["personal"] / gains["local"]}


def measure(seed: int, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the federation once, and return its comparisons and summary.

    Args:
        seed: seed of the run.
        overrides: further Hydra overrides.
        folder: output folder of the run.
    """
    command = [sys.executable, "-m", "simulations.run", "preset=claim", f"seed={seed}", *overrides]
    subprocess.run([*command, f"hydra.run.dir={folder}"], check=True)
    rows = json.loads((folder / "evaluation.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    losses = {arm: np.array([row[arm]["loss"] for row in rows]) for arm in ("base", "local", "shared", "personal")}
    hands = np.array([row["kind"] == "hand" for row in rows])
    keys = ("rounds", "best_round", "clients", "legibility", "style", "bytes", "seconds", "peak_rss_mib")
    return {
        "seed": seed,
        **compare(losses),
        "hands only": compare({arm: values[hands] for arm, values in losses.items()}) if hands.any() else None,
        **{key: summary[key] for key in keys},
    }


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each seed."""
    shown = Table(title=f"{results[0]['clients']} writers, held-out letters, mean loss; gain over base [95 % interval]")
    for heading in ("seed", "base", "local", "shared", "personal", *(f"{a} < {b}" for a, b in PAIRS), "× local's gain"):
        shown.add_column(heading, justify="right")
    for result in results:
        cells = [
            str(result["seed"]),
            *(f"{result['loss'][arm]:.5f}" for arm in ("base", "local", "shared", "personal")),
        ]
        for better, worse in PAIRS:
            pair = result[f"{better} < {worse}"]
            low, high = pair["interval"]
            cells.append(f"{pair['mean']:.5f} [{low:.5f}, {high:.5f}], {pair['writers']:.0%} of writers")
        shown.add_row(*cells, f"{result['personal gain / local gain']:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/federation"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/federation.json"))
    arguments, overrides = parser.parse_known_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(
            pool.map(lambda seed: measure(seed, overrides, arguments.runs / f"seed-{seed}"), arguments.seeds)
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    record = {
        "command": " ".join(["python -m bench.quality.federation", f"--jobs {arguments.jobs}", *overrides]),
        "machine": {"device": device, "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "flwr")},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=200).print(table(results))


if __name__ == "__main__":
    main()
