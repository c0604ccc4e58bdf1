"""What does privacy leave of the gain?  python -m bench.utility [--seeds 0 1 2] [--forms …] [key=value …]

The gain kept by the *shared adapter alone*, (L_base − L) / (L_base − L_reference) over the same writers' held-out
letters; the personal adapter, which needs no noise and would hide a useless shared one, stands beside it.

    reference  the best shared adapter without privacy: whole factors, rounds and steps chosen for it
    open       without privacy, but for that as the private ones: cores, rounds, steps
    example-8  DP-SGD on every device, ε = 8 per image          example-2  the same, ε = 2
    device-8   the server's clip and noise, ε = 8 per device

Test writers are looked at once. `--tune` runs on development writers, of whom there are few: there ε is raised until
the noise on the mean is what so many test writers will see (such a run is no release, and says nothing of privacy).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.federation import interval
from bench.machine import machine, versions
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for

DELTA, PICTURES, WRITERS, DEVELOPMENT = 1e-3, 20, 200, 20
ROUNDS, STEPS, BATCH = 20, 5, 5  # with privacy of examples
FEWER_ROUNDS = 10  # with privacy of devices: each has its noise
TARGETS = {"example-8": 0.6, "example-2": 0.35, "device-8": 0.5}
COMMON = (f"data.train={PICTURES}", "evaluation.local=false", "evaluation.gallery=0", "tracker=none")
CORES = ("strategy=fedit", "adapter.frame=glyphs-frame")
EXAMPLE = (*CORES, "strategy.decay=true", f"rounds={ROUNDS}", f"adapter.shared.steps={STEPS}",
           f"adapter.shared.batch_size={BATCH}")  # fmt: skip


class Form(NamedTuple):
    """One way to run the federation."""

    overrides: tuple[str, ...]
    learning_rate: float
    level: str = "none"
    epsilon: float | None = None


FORMS: Mapping[str, Form] = {
    "reference": Form(("strategy=exact", "strategy.decay=true", "rounds=30", "adapter.shared.steps=5"), 0.006),
    "open": Form(EXAMPLE, 0.02),
    "example-8": Form(EXAMPLE, 0.15, "example", 8.0),
    "example-2": Form(EXAMPLE, 0.08, "example", 2.0),
    "device-8": Form(
        (*CORES, f"rounds={FEWER_ROUNDS}", "adapter.shared.steps=10", "adapter.shared.batch_size=10"),
        0.02,
        "device",
        8.0,
    ),
}


def louder(form: Form) -> float:
    """The ε at which so few development writers leave as much noise on the mean as all test writers at the form's."""
    assert form.epsilon
    rate, steps = (BATCH / PICTURES, ROUNDS * STEPS) if form.level == "example" else (1.0, FEWER_ROUNDS)
    few = DEVELOPMENT / WRITERS
    sigma = noise_multiplier_for(epsilon=form.epsilon, delta=DELTA, sampling_rate=rate, steps=steps)
    # Each device's noise is divided by √devices in the mean, the server's by their number.
    scaled = sigma * (few**0.5 if form.level == "example" else few)
    event = PoissonGaussian(noise_multiplier=scaled, sampling_rate=rate, steps=steps)
    return epsilon([event], DELTA).value


def command(form: Form, seed: int, *, tune: bool, writers: int, overrides: Sequence[str]) -> list[str]:
    """What runs it."""
    whose = ["data.role=development"] if tune else ["data.role=test"]
    private, rate = [f"privacy={form.level}"], form.learning_rate
    if tune and form.level == "example":  # whose AdamW divides by its own device's noise
        rate *= (DEVELOPMENT / WRITERS) ** 0.5
    if form.epsilon:
        private += [f"privacy.delta={DELTA}", f"privacy.epsilon={louder(form) if tune else form.epsilon}"]
    return [
        sys.executable, "-m", "simulations.run", *COMMON, *form.overrides, *private, *whose, f"data.writers={writers}",
        f"adapter.shared.learning_rate={rate}", f"seed={seed}", *overrides,
    ]  # fmt: skip


def run(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run it, unless it was; what it left."""
    if not (folder / "summary.json").exists():
        resume = ["resume=true"] if (folder / "run.json").exists() else []
        subprocess.run([*arguments, f"hydra.run.dir={folder}", *resume], check=True)
    rows = json.loads((folder / "evaluation.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {arm: [row[arm]["loss"] for row in rows] for arm in ("base", "shared", "personal")}
    return {
        "losses": losses, "epsilon": summary["epsilon"], "device_epsilon": summary["device_epsilon"],
        "bytes": summary["bytes"], "seconds": summary["seconds"], "snr": [row.get("snr") for row in rounds],
    }  # fmt: skip


def kept(found: Mapping[str, Any], reference: Mapping[str, Any], arm: str) -> tuple[float, float, float]:
    """The share of the reference's gain that an arm keeps, with its 95 % interval over writers.

    The interval is that of the mean difference from base, over the reference's mean gain.
    """
    base = np.array(found["losses"]["base"])
    whole = float((np.array(reference["losses"]["base"]) - np.array(reference["losses"]["shared"])).mean())
    gain = base - np.array(found["losses"][arm])
    low, high = interval(gain)
    return float(gain.mean()) / whole, low / whole, high / whole


def table(results: Mapping[int, Mapping[str, Mapping[str, Any]]], writers: int) -> Table:
    """A row for each form and seed."""
    title = f"{writers} writers, {PICTURES} letters each: share of the reference's gain that is kept [95 %]"
    shown = Table(title=title)
    for heading in ("form", "seed", "base", "shared", "kept by shared", "at least", "kept with personal", "ε"):
        shown.add_column(heading, justify="right")
    for name in FORMS:
        for seed, forms in results.items():
            if name in forms:
                shown.add_row(*cells(name, seed, forms))
    return shown


def cells(name: str, seed: int, forms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row."""
    found = forms[name]
    base, loss = (f"{np.mean(found['losses'][arm]):.4f}" for arm in ("base", "shared"))
    shared, personal = (
        f"{mean:.0%} [{low:.0%}, {high:.0%}]"
        for mean, low, high in (kept(found, forms["reference"], arm) for arm in ("shared", "personal"))
    )
    target = f"{TARGETS[name]:.0%}" if name in TARGETS else ""
    spent = found["epsilon"] or found["device_epsilon"]
    return [
        name, str(seed), base, loss, shared, target, personal,
        f"{spent['value']:.2f} per {spent['unit']}" if spent else "∞",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument(
        "--tune", action="store_true", help="on development writers, with the noise that tests will see"
    )
    parser.add_argument("--runs", type=Path, default=Path("outputs/utility"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=None)
    arguments, overrides = parser.parse_known_args()
    writers = DEVELOPMENT if arguments.tune else WRITERS
    chosen = list(dict.fromkeys(["reference", *arguments.forms]))
    results: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        results[seed] = {}
        for name in chosen:
            made = command(FORMS[name], seed, tune=arguments.tune, writers=writers, overrides=overrides)
            folder = arguments.runs / ("tune" if arguments.tune else "test") / f"{name}-{seed}"
            results[seed][name] = run(made, folder)
    arms = ("shared", "personal")
    shares = {
        seed: {name: {arm: kept(found, forms["reference"], arm) for arm in arms} for name, found in forms.items()}
        for seed, forms in results.items()
    }
    record = {
        "command": " ".join(["python -m bench.utility", *sys.argv[1:]]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions("torch", "diffusers", "flwr", "dp-accounting"),
        "writers": writers,
        "pictures": PICTURES,
        "kept": shares,
        "results": results,
    }
    out = arguments.out or Path("bench/results") / ("utility-tuning.json" if arguments.tune else "utility.json")
    out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=160).print(table(results, writers))


if __name__ == "__main__":
    main()
