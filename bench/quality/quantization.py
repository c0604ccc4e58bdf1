"""Loss of gain on a quantized base.

    anther bench quantization [--seeds 0 1 2] [--modes …] [key=value …]

Runs the same non-private federation over the same test writers on the base in float32 and quantized; training and
evaluation use the stored base. Gains are measured from the loss of the *float32* base, so they include the
loss by quantization: kept = (L_base − L_arm) / (L_base − L_reference), with L_base and L_reference in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.quality.utility import COMMON, FORMS, run, share

TARGETS = {"int8": 0.97, "mixed": 0.93, "nf4": 0.85}
MODES = ("fp32", *TARGETS)
ARMS = ("shared", "personal")
WRITERS, PICTURES, BATCH = 100, 20, 5


def command(mode: str, seed: int) -> list[str]:
    """Return the command line of one federation."""
    form = FORMS["reference"]
    return [
        sys.executable,
        "-m",
        "simulations.run",
        *COMMON,
        *form.overrides,
        "privacy=none",
        f"base.weights={mode}",
        "data.role=test",
        f"data.writers={WRITERS}",
        f"data.train={PICTURES}",
        f"adapter.shared.batch_size={BATCH}",
        f"adapter.shared.lr={form.learning_rate}",
        f"seed={seed}",
    ]


def gain_kept(
    quantized_losses: Mapping[str, Any], fp32_losses: Mapping[str, Any], arm: str
) -> tuple[float, float, float]:
    """Compute the share of float32's gain that an arm keeps, with its 95 % interval over writers.

    The interval is that of the mean difference to the float32 base, divided by float32's mean gain.

    Args:
        quantized_losses: losses of the quantized run, by arm.
        fp32_losses: losses of the float32 run, by arm.
        arm: `shared` or `personal`.
    """
    base, reference, loss = (
        np.array(losses) for losses in (fp32_losses["base"], fp32_losses[arm], quantized_losses[arm])
    )
    return share(base - loss, base - reference)


def table(runs: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return a table with a row for each mode and seed."""
    shown = Table(title="share of the float32 base's gain that is kept [95 %]")
    for heading in ("weights", "seed", "its base", *(f"kept by {arm}" for arm in ARMS), "at least"):
        shown.add_column(heading, justify="right")
    for mode in MODES:
        for seed, modes in runs.items():
            if mode in modes:
                shares = (gain_kept(modes[mode], modes["fp32"], arm) for arm in ARMS)
                cells = (f"{mean:.1%} [{low:.0%}, {high:.0%}]" for mean, low, high in shares)
                least = f"{TARGETS[mode]:.0%}" if mode in TARGETS else ""
                shown.add_row(mode, str(seed), f"{np.mean(modes[mode]['base']):.4f}", *cells, least)
        shown.add_section()
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=TARGETS, default=list(TARGETS), help="in addition to fp32")
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/quality"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments, overrides = parser.parse_known_args()
    work = [(seed, mode) for seed in arguments.seeds for mode in ("fp32", *arguments.modes)]

    def run_one(seed: int, mode: str) -> dict[str, list[float]]:
        losses: dict[str, list[float]] = run([*command(mode, seed), *overrides], arguments.runs / f"{mode}-{seed}")[
            "losses"
        ]
        return losses

    runs: dict[int, dict[str, dict[str, list[float]]]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (seed, mode), losses in zip(work, pool.map(lambda which: run_one(*which), work), strict=True):
            runs.setdefault(seed, {})[mode] = losses
    record = {
        "command": " ".join(["python -m bench.quality.quantization", *sys.argv[1:]]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions("torch", "diffusers", "flwr"),
        "results": [
            {
                "seed": seed,
                "kept": {
                    mode: {arm: gain_kept(losses_of_mode, modes["fp32"], arm) for arm in ARMS}
                    for mode, losses_of_mode in modes.items()
                },
                "losses": modes,
            }
            for seed, modes in runs.items()
        ],
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=120).print(table(runs))


if __name__ == "__main__":
    main()
