"""Gain kept under differential privacy.

    anther bench utility [--seeds 0 1 2] [--forms …] [key=value …]

Measures the gain kept by the *shared adapter without the personal one*, (L_base − L) / (L_base − L_reference) over the
same writers' held-out letters. The personal adapter needs no noise and would hide a useless shared one; its result is
reported separately.

    reference  the best shared adapter without privacy: complete factors, with its own best rounds and steps
    open       without privacy, otherwise like the private forms: cores, rounds, steps
    example-8  DP-SGD on every device, ε = 8 per image          example-2  the same, ε = 2
    device-8   clipping and noise on the server, ε = 8 per device

    --curves   ε = 8 per image against number of writers, and against pictures of each, one seed

Test writers are evaluated once. `--tune` runs on the few development writers, with ε raised until the
noise on the mean is that of a run with all test writers (such a run is no release, and its ε has no meaning).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bench.lib.machine import machine, versions
from bench.lib.paired import bootstrap_interval
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for


class WriterCohort(NamedTuple):
    """Number of writers and of their pictures."""

    writers: int
    pictures: int  # training pictures of each writer


DELTA = 1e-3
TEST, DEVELOPMENT = WriterCohort(200, 20), WriterCohort(20, 20)
CURVES = (WriterCohort(50, 20), WriterCohort(100, 20), TEST, WriterCohort(200, 12), WriterCohort(200, 4))
ROUNDS = {"example": 25, "device": 10}
TARGETS = {"example-8": 0.6, "example-2": 0.35, "device-8": 0.5}
COMMON = (
    "evaluation.baseline_local=false",
    "evaluation.gallery_size=0",
    "cohort.eval_size=20",
    "tracker=none",
    "base.compute_dtype=bf16",
)
CORES = ("aggregation=fedsb",)
# A round of one step takes the mean after every noised step, so the noise causes no drift within a round.
EXAMPLE = (*CORES, "adapter.shared.lr_schedule=cosine", f"rounds={ROUNDS['example']}", "adapter.shared.steps=1")
DRAWS = "privacy.noise_multiplicity=8"  # noises and timesteps per picture; the mean of their gradients is clipped


class RunForm(NamedTuple):
    """Settings of one form of the federation."""

    overrides: tuple[str, ...]
    learning_rate: float
    level: str = "none"
    epsilon: float | None = None
    share: int = 4  # divisor of a writer's pictures that gives the batch size


FORMS: Mapping[str, RunForm] = {
    "reference": RunForm(
        ("aggregation=fedit", "adapter.shared.lr_schedule=cosine", "rounds=60", "adapter.shared.steps=5"), 0.012
    ),
    "open": RunForm(EXAMPLE, 0.08, share=1),
    "example-8": RunForm((*EXAMPLE, DRAWS), 0.3, "example", 8.0, share=1),
    "example-2": RunForm((*EXAMPLE, DRAWS), 0.3, "example", 2.0, share=1),
    "device-8": RunForm((*CORES, f"rounds={ROUNDS['device']}", "adapter.shared.steps=5"), 0.02, "device", 8.0),
}


def tuning_epsilon(form: RunForm) -> float:
    """Return the ε at which development writers have the noise on the mean that test writers have at the form's ε."""
    assert form.epsilon
    steps, few = ROUNDS[form.level], DEVELOPMENT.writers / TEST.writers
    sigma = noise_multiplier_for(epsilon=form.epsilon, delta=DELTA, sampling_rate=1.0, steps=steps)
    # In the mean, each device's noise is divided by √devices, the server's noise by their number.
    scaled = sigma * (few**0.5 if form.level == "example" else few)
    event = PoissonGaussian(noise_multiplier=scaled, sampling_rate=1.0, steps=steps)
    return epsilon([event], DELTA).value


def command(form: RunForm, seed: int, cohort: WriterCohort, *, tune: bool, overrides: Sequence[str]) -> list[str]:
    """Return the command line of one federation.

    Args:
        form: settings of the federation.
        seed: seed of the run.
        cohort: number of writers and pictures.
        tune: whether to run on development writers.
        overrides: further Hydra overrides.
    """
    role, batch = "development" if tune else "test", cohort.pictures // form.share
    private, rate = [f"privacy={form.level}"], form.learning_rate
    if tune and form.level == "example":  # AdamW divides by the noise of its own device
        rate *= (DEVELOPMENT.writers / TEST.writers) ** 0.5
    if form.epsilon:
        private += [f"privacy.delta={DELTA}", f"privacy.epsilon={tuning_epsilon(form) if tune else form.epsilon}"]
    return [
        sys.executable,
        "-m",
        "simulations.run",
        *COMMON,
        *form.overrides,
        *private,
        f"data.role={role}",
        f"data.writers={cohort.writers}",
        f"data.train={cohort.pictures}",
        f"adapter.shared.batch_size={batch}",
        f"adapter.shared.lr={rate}",
        f"seed={seed}",
        *overrides,
    ]


def run_once(arguments: Sequence[str], folder: Path) -> None:
    """Run a federation unless it is complete; an interrupted run is resumed."""
    if not (folder / "summary.json").exists():
        resume = ["resume=true"] if (folder / "run.json").exists() else []
        subprocess.run([*arguments, f"hydra.run.dir={folder}", *resume], check=True)


def run(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a federation unless it is complete, and return its results."""
    run_once(arguments, folder)
    rows = json.loads((folder / "evaluation.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {arm: [row[arm]["loss"] for row in rows] for arm in ("base", "shared", "personal")}
    return {
        "parameters": parameters(folder, cores=set(CORES) <= set(arguments)),
        "losses": losses,
        "epsilon": summary["epsilon"],
        "device_epsilon": summary["device_epsilon"],
        "bytes": summary["bytes"],
        "seconds": summary["seconds"],
        "snr": [row.get("snr") for row in rounds],
    }


def parameters(folder: Path, *, cores: bool) -> int:
    """Count the numbers that a device trains: r (d_in + d_out) per site, or r² per core."""
    factors = load_file(folder / "adapters" / "shared.safetensors")
    if cores:
        return sum(len(factor) ** 2 for name, factor in factors.items() if "lora_A" in name)
    return sum(factor.numel() for factor in factors.values())


def gain_kept(result: Mapping[str, Any], reference: Mapping[str, Any], arm: str) -> tuple[float, float, float]:
    """Compute the share of the reference's gain that an arm keeps, with its 95 % interval over writers.

    The interval is that of the mean difference to the base, divided by the reference's mean gain.

    Args:
        result: results of the run.
        reference: results of the reference.
        arm: `shared` or `personal`.
    """
    base = np.array(result["losses"]["base"])
    reference_gain = np.array(reference["losses"]["base"]) - np.array(reference["losses"]["shared"])
    return share(base - np.array(result["losses"][arm]), reference_gain)


def share(gain: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Divide the mean of a gain `[writers]` by another's, with its 95 % interval for a fixed divisor."""
    low, high = bootstrap_interval(gain)
    mean = float(reference.mean())
    return float(gain.mean()) / mean, low / mean, high / mean


def table(results: Mapping[tuple[WriterCohort, int], Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return a table with a row for each cohort, form and seed."""
    shown = Table(title="share of the reference's gain that is kept [95 %]")
    for heading in (
        "writers",
        "pictures",
        "form",
        "seed",
        "trained",
        "base",
        "shared",
        "kept by shared",
        "at least",
        "kept with personal",
        "ε",
    ):
        shown.add_column(heading, justify="right")
    for name in FORMS:
        for (cohort, seed), forms in results.items():
            if name in forms:
                shown.add_row(*map(str, cohort), name, str(seed), *cells(name, forms, cohort))
    return shown


def cells(name: str, forms: Mapping[str, Mapping[str, Any]], cohort: WriterCohort) -> list[str]:
    """Format the results of one run as table cells.

    Args:
        name: name of the form.
        forms: results by form.
        cohort: number of writers and pictures.
    """
    result = forms[name]
    base, loss = (f"{np.mean(result['losses'][arm]):.4f}" for arm in ("base", "shared"))
    shared, personal = (
        f"{mean:.0%} [{low:.0%}, {high:.0%}]"
        for mean, low, high in (gain_kept(result, forms["reference"], arm) for arm in ("shared", "personal"))
    )
    target = f"{TARGETS[name]:.0%}" if name in TARGETS and cohort == TEST else ""
    spent = result["epsilon"] or result["device_epsilon"]
    promise = f"{spent['value']:.2f} per {spent['unit']}" if spent else "∞"
    return [f"{result['parameters']:,}", base, loss, shared, target, personal, promise]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/utility"), help="folder for the runs")
    parser.add_argument("--out", type=Path, help="bench/results/utility[-curves|-tuning].json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--curves", action="store_true", help="ε = 8 per image against writers and pictures")
    which.add_argument("--tune", action="store_true", help="development writers, with the noise of test writers")
    arguments, overrides = parser.parse_known_args()
    cohorts, seeds, forms = [DEVELOPMENT if arguments.tune else TEST], arguments.seeds, arguments.forms
    if arguments.curves:
        cohorts, seeds, forms = list(CURVES), seeds[:1], ["example-8"]
    names = list(dict.fromkeys(["reference", *forms]))
    work = [(cohort, seed, name) for seed in seeds for cohort in cohorts for name in names]

    def one(cohort: WriterCohort, seed: int, name: str) -> dict[str, Any]:
        arguments_of_run = command(FORMS[name], seed, cohort, tune=arguments.tune, overrides=overrides)
        kind = "tune" if arguments.tune else "test"
        return run(arguments_of_run, arguments.runs / kind / f"{cohort.writers}x{cohort.pictures}" / f"{name}-{seed}")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        results_of_runs = list(pool.map(lambda which: one(*which), work))
    results: dict[tuple[WriterCohort, int], dict[str, Any]] = {}
    for (cohort, seed, name), result in zip(work, results_of_runs, strict=True):
        results.setdefault((cohort, seed), {})[name] = result
    record = {
        "command": " ".join(["python -m bench.quality.utility", *sys.argv[1:]]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions("torch", "diffusers", "flwr", "dp-accounting"),
        "results": [
            {
                **cohort._asdict(),
                "seed": seed,
                "kept": {
                    name: {arm: gain_kept(result, ran["reference"], arm) for arm in ("shared", "personal")}
                    for name, result in ran.items()
                },
                "runs": ran,
            }
            for (cohort, seed), ran in results.items()
        ],
    }
    suffix = "-tuning" if arguments.tune else "-curves" if arguments.curves else ""
    out = arguments.out or Path(f"bench/results/utility{suffix}.json")
    out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=160).print(table(results))


if __name__ == "__main__":
    main()
