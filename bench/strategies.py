"""How should adapters be combined, and who be asked for what?

    python -m bench.strategies aggregators|fleets [key=value …]

    aggregators  every rule × heterogeneity: equal and mixed ranks, half the fleet on half the sites, label skew, few
                 and many writers, with and without privacy (`bench.aggregators`)
    fleets       selection and planning, and the timing of rounds, on fleets that live: in simulated hours, kWh and
                 devices lost (`bench.fleets`)

Test writers are looked at once. `--tune` runs on development writers, and writes no result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import aggregators, fleets
from bench.machine import machine, versions

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("aggregators", "fleets"))
    parser.add_argument("--tune", action="store_true", help="on development writers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="of the rules, or of the fleets: week, spread, grid")
    parser.add_argument("--settings", nargs="+", choices=aggregators.SETTINGS, default=list(aggregators.SETTINGS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("outputs/strategies"), help="folder for the runs")
    arguments, overrides = parser.parse_known_args()
    console = Console(width=200)
    common: dict[str, Any] = {"jobs": arguments.jobs, "runs": arguments.runs, "overrides": overrides}
    found: Any = None
    if arguments.what == "fleets":
        found = fleets.measure(
            arguments.only or ["week", "spread"], role="development" if arguments.tune else "test",
            seeds=arguments.seeds, console=console, **common,
        )  # fmt: skip
    else:
        rules = arguments.only or list(aggregators.RULES)
        if arguments.tune:
            console.print(aggregators.tuned(aggregators.tune(rules, **common)))
        else:
            found = aggregators.measure(rules, arguments.settings, arguments.seeds, **common)
            console.print(aggregators.table(found))
    if not arguments.tune:
        write(arguments.what, found)


def write(what: str, found: Any) -> None:
    """bench/results/`what`.json."""
    record = {
        "command": " ".join(["python -m bench.strategies", *sys.argv[1:]]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions("torch", "diffusers", "flwr"),
        "results": found,
    }
    (RESULTS / f"{what}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
