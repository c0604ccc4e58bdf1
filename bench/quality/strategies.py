"""Benchmarks of aggregation, selection and planning.

    anther bench strategies aggregators|fleets|page [key=value …]

    aggregators  every rule × heterogeneity: equal and mixed ranks, half the fleet on half the sites, label skew, few
                 and many writers, with and without privacy (`bench.quality.aggregators`)
    fleets       selection, planning and round timing on simulated fleets, in simulated hours, kWh and lost devices
                 (`bench.quality.fleets`)
    page         generates docs/strategies.md from the results of both and of `bench.robustness.byzantine`

Test writers are evaluated once. `--tune` runs on development writers, and writes no results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.lib.machine import machine, versions
from bench.quality import aggregators, fleets, strategies_page

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("aggregators", "fleets", "page"))
    parser.add_argument("--tune", action="store_true", help="run on development writers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="rules, or fleets of: week, spread, grid")
    parser.add_argument("--settings", nargs="+", choices=aggregators.SETTINGS, default=list(aggregators.SETTINGS))
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/strategies"), help="folder for the runs")
    arguments, overrides = parser.parse_known_args()
    if arguments.what == "page":
        strategies_page.write_page()
    else:
        results = run(arguments, overrides)
        if not arguments.tune:
            write(arguments.what, results, overrides)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """Run a benchmark, print its tables, and return its results."""
    console = Console(width=200)
    common: dict[str, Any] = {"jobs": arguments.jobs, "runs": arguments.runs, "overrides": overrides}
    if arguments.what == "fleets":
        return fleets.measure(
            arguments.only or ["week", "spread"],
            role="development" if arguments.tune else "test",
            seeds=arguments.seeds,
            console=console,
            **common,
        )
    rules = arguments.only or list(aggregators.RULES)
    if arguments.tune:
        rates = aggregators.tune(rules, **common)
        console.print(aggregators.rate_table(rates))
        return rates
    results = aggregators.measure(rules, arguments.settings, arguments.seeds, **common)
    console.print(aggregators.table(results))
    return results


def write(name: str, results: Any, overrides: Sequence[str]) -> None:
    """Write the results to bench/results/`name`.json.

    Args:
        name: name of the benchmark.
        results: its results.
        overrides: Hydra overrides of the command.
    """
    record = {
        "command": " ".join(["python -m bench.quality.strategies", name, *overrides]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions("torch", "diffusers", "flwr"),
        "results": results,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
