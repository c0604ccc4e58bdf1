"""Speed of shared passes against training one client at a time.

    anther bench cohort --device cuda|cpu [--bases small medium sd15] [--peers …]

Times a client-step (4 examples, forward, backward and AdamW for one client's adapter) of the cohort trainer,
non-private and private, and of the fastest known implementations that train one client at a time, on the same base in
the same run:

    peft      diffusers + peft + torch.optim.AdamW (non-private)
    opacus    the same with Opacus' hooks and DPOptimizer (DP)
    hooks     our own hooks and one flat buffer; on a GPU as CUDA graphs (DP)
    one       the cohort trainer with one client per pass (DP)

The floor is the time of a client-step's operations at the rate of a large matrix product, measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.lib.workloads import BATCH, EXAMPLES, POISSON_SIZES, RANK, WORKLOADS, Workload, build
from bench.throughput.roofline import matrix_rate, operations, synchronize
from bench.throughput.step_variants import PEERS, StepVariant, TimingSettings, step_variants
from training.capacity import budget

TARGET_SPEEDUP = {  # targets on a GPU in bf16: minimum speedup of the cohort over the fastest variant of each peer
    "small": {"peft": 60.0, "opacus": 120.0},
    "medium": {"peft": 18.0, "opacus": 60.0},
    "sd15": {"peft": 5.0, "opacus": 12.0},
}
TARGET_SHARE = {"sd15": 0.45}  # target fraction of the matrix rate for the private cohort
MAX_DP_COST = 1.05  # largest ratio of private to non-private time


@dataclass
class StepTimings:
    """Timings of every repeat of one variant; a client-step is 4 examples, whatever the Poisson batch sizes."""

    client_steps: int
    first: float  # seconds of the first repeat, which warms up and compiles, and is excluded from the statistics
    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)

    @property
    def milliseconds(self) -> list[float]:
        """Milliseconds of a client-step in each repeat."""
        return [1e3 * s * BATCH / n for s, n in zip(self.seconds, self.examples, strict=True)]

    @property
    def median(self) -> float:
        """Median milliseconds of a client-step."""
        return statistics.median(self.milliseconds)

    def record(self) -> dict[str, Any]:
        """Return all fields and the median, for the result file."""
        return {"milliseconds": self.median, "each": self.milliseconds, **vars(self)}


def time_repeat(form: StepVariant, device: torch.device) -> tuple[float, int]:
    """Run one repeat, and return its seconds and number of examples."""
    form.prepare()
    synchronize(device)
    started = time.perf_counter()
    seen = form.run()
    synchronize(device)
    return time.perf_counter() - started, seen


class VariantResults(NamedTuple):
    """Timings and errors of a group of variants."""

    timings: dict[str, StepTimings]
    errors: dict[str, str]  # message of each variant that failed
    rates: list[float]  # operations per second of the matrix product, after each repeat


def run(variants: Mapping[str, Callable[[], StepVariant]], setting: TimingSettings) -> VariantResults:
    """Time the variants in turns; a failing variant must not affect the others."""
    running: dict[str, StepVariant] = {}
    results = VariantResults({}, {}, [])
    for name, make in variants.items():
        try:
            form = make()
            results.timings[name] = StepTimings(form.client_steps, time_repeat(form, setting.device)[0])
            running[name] = form
        except Exception as error:
            results.errors[name] = f"{type(error).__name__}: {error}"[:1000]
            traceback.print_exc()
    for _ in range(setting.repeats):
        for name, form in running.items():
            seconds, seen = time_repeat(form, setting.device)
            results.timings[name].seconds.append(seconds)
            results.timings[name].examples.append(seen)
        results.rates.append(matrix_rate(setting.device, setting.dtype))
    return results


def measure(workload: Workload, setting: TimingSettings, peers: Sequence[str]) -> dict[str, Any]:
    """Time all variants on one base.

    Args:
        workload: the base and its number of clients.
        setting: device, precision and repeats.
        peers: names of `PEERS` to compare with.
    """
    groups = list(step_variants(workload, setting, peers))
    if setting.device.type == "cpu":  # its speed drifts, so all variants take turns
        groups = [{name: make for group in groups for name, make in group.items()}]
    timings: dict[str, StepTimings] = {}
    errors: dict[str, str] = {}
    rates: list[float] = []
    for group in groups:
        results = run(group, setting)
        timings |= results.timings
        errors |= results.errors
        rates = results.rates  # the last group is the cohort's
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    work = operations(workload)
    return {
        "parameters": sum(parameter.numel() for parameter in build(workload, torch.device("meta")).parameters()),
        "clients": setting.clients or workload.clients,
        "operations": work,
        "rates": rates,
        **compare(timings, [1e3 * work / rate for rate in rates]),
        "forms": {name: timing.record() for name, timing in timings.items()},
        "errors": errors,
    }


def compare(timings: Mapping[str, StepTimings], floors: Sequence[float]) -> dict[str, Any]:
    """Compare non-private variants with the non-private cohort, and private ones with the private cohort.

    Args:
        timings: timings by variant.
        floors: lower bound of a client-step in milliseconds, in each repeat.
    """
    result: dict[str, Any] = {"floor": statistics.median(floors), "faster": {}}
    for name, timing in timings.items():
        cohort = timings.get("cohort" if name.startswith("peft") else "cohort DP")
        if cohort and not name.startswith("cohort"):
            result["faster"][name] = median_paired_ratio(timing.milliseconds, cohort.milliseconds)
    if plain := timings.get("cohort"):
        result["share"] = median_paired_ratio(floors, plain.milliseconds)
    if private := timings.get("cohort DP"):
        result["share DP"] = median_paired_ratio(floors, private.milliseconds)
    if plain and private:
        result["DP over plain"] = median_paired_ratio(private.milliseconds, plain.milliseconds)
    return result


def median_paired_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over repeats of the ratio of two times; times of the same repeat share the machine's drift."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def table(record: Mapping[str, Any]) -> Table:
    """Return a table of milliseconds per client-step, a row for each variant on each base."""
    has_targets = "gpu" in record["machine"] and record["settings"]["precision"] == "bf16"
    shown = Table(title="milliseconds per client-step", caption=caption(record), min_width=100)
    for heading in ("base", "form", "median", "least to most", "first repeat, s", "cohort is faster by", "target"):
        shown.add_column(heading, justify="left" if heading in ("base", "form") else "right")
    for base, base_results in record["bases"].items():
        for name, form in base_results["forms"].items():
            faster = base_results["faster"].get(name)
            wanted = (
                TARGET_SPEEDUP.get(base, {}).get(name.split()[0])
                if has_targets and name in strongest(base_results["faster"])
                else None
            )
            least, most = min(form["each"]), max(form["each"])
            shown.add_row(
                base,
                name,
                f"{form['milliseconds']:.3g}",
                f"{least:.3g} to {most:.3g}",
                f"{form['first']:.1f}",
                f"{faster:.3g} ×" if faster else "",
                f"≥ {wanted:.3g} ×" if wanted else "",
            )
        for name, error in base_results["errors"].items():
            shown.add_row(base, name, "failed", error[:40])
        for name in ("share", "share DP"):
            if name in base_results:
                target = (
                    f"≥ {TARGET_SHARE[base]:.0%}" if has_targets and name == "share DP" and base in TARGET_SHARE else ""
                )
                shown.add_row(
                    base, f"floor, {name}", f"{base_results['floor']:.3g}", "", "", f"{base_results[name]:.1%}", target
                )
        if "DP over plain" in base_results:
            shown.add_row(
                base,
                "DP over plain",
                "",
                "",
                "",
                f"{base_results['DP over plain']:.3f}",
                f"≤ {MAX_DP_COST}" if has_targets else "",
            )
        shown.add_section()
    return shown


def strongest(faster: Mapping[str, float]) -> set[str]:
    """Return the fastest variant of each peer, with which a claim is compared."""
    peers = {name.split()[0] for name in faster}
    return {min((n for n in faster if n.split()[0] == peer), key=lambda n: faster[n]) for peer in peers}


def caption(record: Mapping[str, Any]) -> str:
    """Describe the settings of a record."""
    settings, where = record["settings"], record["machine"]
    rate = statistics.median(rate for base_results in record["bases"].values() for rate in base_results["rates"])
    ways = (
        " autocast: fp32 factors under torch.autocast; fp32: fp32 factors, no autocast; compute: factors, moments and "
        "noise in bf16."
    )
    return (
        f"{where.get('gpu') or where['processor']}. Weights and activations in {settings['precision']}; the cohort and "
        f"hooks keep factors, moments and noise in fp32.{ways if settings['precision'] == 'bf16' else ''} LoRA of rank "
        f"{RANK} at every attention projection; a client-step is {BATCH} examples (DP: Poisson from {EXAMPLES}, scaled "
        f"to {BATCH}) and one step of AdamW. Median of {settings['repeats']} repeats after the first. Cohort: "
        f"{'compiled' if settings['compiled'] else 'eager'}, {settings['steps']} steps a job, including their set-up; "
        f"others: {len(POISSON_SIZES)} steps, without set-up. Floor: matrix products and convolutions at the "
        f"rate of a large product in the same precision, {rate / 1e12:.3g} TFLOP/s."
    )


def settings(arguments: argparse.Namespace) -> TimingSettings:
    """Build the settings from the command line and the device's defaults."""
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    return TimingSettings(
        device=device,
        precision=arguments.precision or ("bf16" if gpu else "fp32"),
        repeats=arguments.repeats,
        steps=arguments.steps,
        clients=arguments.clients,
        memory=budget(arguments.memory, device),
        compiled=gpu and not arguments.eager,
    )


def parse_command_line(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bases", nargs="+", choices=tuple(WORKLOADS), help="default: all on a GPU, small on a CPU")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all on a CPU, all but `one` on a GPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of each job of the cohort")
    parser.add_argument("--clients", type=int, help="clients of the cohort (default: per base)")
    parser.add_argument("--memory", type=float, help="GiB for the cohort (default: the trainer's)")
    parser.add_argument("--eager", action="store_true", help="don't compile the cohort")
    parser.add_argument("--out", type=Path, help="bench/results/cohort-<device>.json")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_command_line()
    silence_warnings()
    setting = settings(arguments)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in convolutions too
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.throughput.cohort", *sys.argv[1:]]),
        "machine": machine(setting.device),
        "versions": versions("torch", "diffusers", "peft", "opacus", "triton"),
        "settings": {**vars(setting), "device": str(setting.device)},
        "bases": {},
    }
    out = arguments.out or Path(f"bench/results/cohort-{setting.device.type}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    gpu = setting.device.type == "cuda"
    peers = (PEERS[:-1] if gpu else PEERS) if arguments.peers is None else arguments.peers
    for base in arguments.bases or (("small", "medium", "sd15") if gpu else ("small",)):
        record["bases"][base] = measure(WORKLOADS[base], setting, peers)
        out.write_text(json.dumps(record, indent=2) + "\n")  # after each base, so an interrupted run keeps its results
        Console(width=120).print(table({**record, "bases": {base: record["bases"][base]}}))
    if any(base_results["errors"] for base_results in record["bases"].values()):
        sys.exit(f"a variant failed: see 'errors' in {out}")


def silence_warnings() -> None:
    """Silence known warnings: diffusers' of a UNet's conversion to bf16, torch's of Opacus' hook on the root module."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "Full backward hook is firing")


if __name__ == "__main__":
    main()
