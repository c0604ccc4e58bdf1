"""Peak memory of one private step of a published base, by memory-saving options.

    anther bench lean --base sd15

Every rung runs in its own process, with one more option than the previous rung. Weights are random, which doesn't
change the cost of a step; gradients are compared with those of a rung in float32. Peaks are the process's high-water
mark, including Python, its libraries and the pages of mapped files.

A base too large for the first rung is compared with another one (`--truth "float32, mapped"`), whose float32 weights
stay in their file. `--rest` prints the packed base's size on disk and the memory to pack it, compared with other
libraries.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.lib.machine import machine, memory, versions
from bench.lib.workloads import schedule
from bench.memory import published_bases, weights_memory
from common import low_memory
from models.base.pack import pack
from models.diffusion.denoiser import Denoiser
from models.families.known import BaseSpec, find_base
from models.files.paging import mark_mapped, release_pages
from models.quantization import packed
from training import cohort
from training.buffers import BufferSpec
from training.capacity import entry_bytes

RESULTS = Path(__file__).parents[1] / "results" / "lean.json"
MEMORY = 64 << 30  # budget above any use: the process's own peak is measured
TARGETS = {"sd15": 1.1, "sdxl": 2.0, "pixart-sigma": 1.0, "bk-sdm-base": 0.7, "bk-sdm-small": 0.7, "bk-sdm-tiny": 0.7}
"""Target of the best rung in GiB, for a picture of 512²."""
COSINE, RATIO = 0.99, 1.7  # targets against float32: cosine of the gradient, ratio of CPU seconds


@dataclass(frozen=True)
class MemoryVariant:
    """Options of one rung."""

    weights: str = "fp32"
    blocks: bool = False  # recompute blocks in backward
    pages: bool = False  # map the base's file, and release the pages of packed layers
    imports: bool = False  # import only the modules that a network needs
    allocator: bool = False  # set the allocator's environment before Python starts


RUNGS = {
    "float32": MemoryVariant(),
    "float32, blocks": MemoryVariant(blocks=True),
    "float32, mapped": MemoryVariant(pages=True),
    "int8": MemoryVariant("int8"),
    "mixed": MemoryVariant("mixed"),
    "mixed, pages": MemoryVariant("mixed", pages=True),
    "mixed, pages, blocks": MemoryVariant("mixed", pages=True, blocks=True),
    "mixed, pages, blocks, imports": MemoryVariant("mixed", pages=True, blocks=True, imports=True),
    "mixed, all but blocks": MemoryVariant("mixed", pages=True, imports=True, allocator=True),
    "mixed, everything": MemoryVariant("mixed", pages=True, blocks=True, imports=True, allocator=True),
    "int8, everything": MemoryVariant("int8", pages=True, blocks=True, imports=True, allocator=True),
    "nf4, everything": MemoryVariant("nf4", pages=True, blocks=True, imports=True, allocator=True),
}


def measure(base: BaseSpec, rung: MemoryVariant, folder: Path, side: int, gradient: Path) -> dict[str, float]:
    """Measure one rung in this process, and store its gradient.

    Args:
        base: the published base.
        rung: options of the rung.
        folder: folder of the packed bases.
        side: side length of the latents.
        gradient: file for the gradient.

    Returns:
        Bytes of memory and seconds by name, and the loss.
    """
    with low_memory.imports() if rung.imports else nullcontext():
        getattr(importlib.import_module("diffusers.models"), base.family.kind)
    results: dict[str, float] = {"imports": memory("VmRSS")}
    network = packed.load(folder / rung.weights / base.family.network, base.family.kind)
    if not rung.pages:
        copy_mapped_tensors(network)
    results["base"] = memory("VmRSS") - results["imports"]
    denoiser = Denoiser(
        network,
        schedule(torch.device("cpu")),
        sites=base.family.sites,
        forward=base.family.forward,
        checkpointing="block" if rung.blocks else "none",
    )
    job, plain, seen = published_bases.private_step_job(base, denoiser, side), cohort.gradients, []

    def spy(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        result = plain(*arguments, **options)
        seen.append(result[0].clone())
        return result

    # Measures a pass, which the step then needn't repeat.
    results["tensors"] = entry_bytes(denoiser, BufferSpec.of([job]))
    cpu_started, started = time.process_time(), time.perf_counter()
    with patch("training.cohort.gradients", spy):
        (outcome,) = cohort.train(denoiser, [job], memory=MEMORY, timesteps=1)
    results |= {"cpu_seconds": time.process_time() - cpu_started, "seconds": time.perf_counter() - started}
    if isinstance(outcome, Exception):
        raise outcome
    results |= {"peak": memory("VmHWM"), "loss": outcome.loss}
    torch.save(seen[0], gradient)
    return results


def copy_mapped_tensors(network: nn.Module) -> None:
    """Replace mapped tensors by copies, as without mapping, and release the pages of the file."""
    mapped = {tensor.data_ptr(): tensor.data for tensor in (*network.parameters(), *network.buffers())}
    mark_mapped(mapped.values())

    def copied(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        release_pages(mapped[tensor.data_ptr()], 0, tensor.numel())
        return copy

    network._apply(copied)


def prepare(base: BaseSpec, folder: Path, modes: set[str]) -> None:
    """Write the base with random weights, and pack it in each mode; float32 is packed without quantized layers.

    Args:
        base: the published base.
        folder: folder for the source and the packed bases.
        modes: modes to pack; existing ones are kept.
    """
    if not (folder / "source").exists():
        published_bases.write_base(base, folder / "source")
    for mode in modes:
        if not (folder / mode).exists():
            pack(str(folder / "source"), folder / mode, mode)


def run_child(*arguments: str, allocator: bool = False) -> str:
    """Run this module in another process, and return its last line of output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(low_memory.ENVIRONMENT if allocator else {})}
    command = [sys.executable, "-m", "bench.memory.lean", *arguments]
    process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return process.stdout.strip().splitlines()[-1] if process.stdout.strip() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15", choices=TARGETS)
    parser.add_argument("--side", type=int, default=64, help="side of the latents: 64 is a picture of 512²")
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS), help=f"of: {'; '.join(RUNGS)}")
    parser.add_argument("--truth", default="float32", choices=RUNGS, help="rung that the others are compared with")
    parser.add_argument("--rest", action="store_true", help="measure only the weights: on disk, and while packing")
    parser.add_argument("--folder", type=Path, help="folder that keeps the packed bases for later runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    base = find_base(args.base)
    if args.prepare:
        prepare(base, args.folder, {RUNGS[name].weights for name in args.rungs})
    elif args.one:
        gradient = args.folder / f"{args.one}-{args.side}.pt"
        print(json.dumps(measure(base, RUNGS[args.one], args.folder, args.side, gradient)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            (measure_weights if args.rest else measure_rungs)(args, (args.folder or Path(scratch)) / args.base)


def measure_rungs(args: argparse.Namespace, folder: Path) -> None:
    """Measure the rungs, print a line for each, and update the result file after each."""
    names = [args.truth, *(name for name in args.rungs if name != args.truth)]
    common = ["--base", args.base, "--folder", str(folder), "--side", str(args.side)]
    run_child("--prepare", *common, "--rungs", *names)
    target = Target.of(args.base)
    print(f"{args.base}, latents of {args.side}², MiB".ljust(30), *HEADS, sep="  ")
    print("wanted".ljust(30) + f"{target.peak:36.0f}{target.ratio:16.2f}{target.cosine:10.5f}")
    rungs: dict[str, dict[str, float]] = {}
    for name in names:
        results = json.loads(run_child("--one", name, *common, allocator=RUNGS[name].allocator))
        one, truth = (torch.load(folder / f"{each}-{args.side}.pt").double().flatten() for each in (name, args.truth))
        results["cosine"] = float(one @ truth / (one.norm() * truth.norm()))
        rungs[name] = results
        print(format_row(name, results, rungs[args.truth], target), flush=True)
        options = ["--side", str(args.side), "--truth", args.truth, "--rungs", *names]
        store_entry(
            args,
            options,
            str(args.side),
            {
                "versions": versions("torch", "diffusers"),
                "truth": args.truth,
                "target": target._asdict(),
                "rungs": {each: {**asdict(RUNGS[each]), **rungs[each]} for each in RUNGS if each in rungs},
            },
        )


def measure_weights(args: argparse.Namespace, folder: Path) -> None:
    """Measure the base's bytes on disk and the memory to pack it, compared with other libraries."""
    run_child("--prepare", "--base", args.base, "--folder", str(folder), "--rungs")
    forms: dict[str, dict[str, int]] = {}
    for form, sizes in weights_memory.table(args.base, folder):
        forms[form] = sizes
        store_entry(
            args,
            ["--rest"],
            "rest",
            {"versions": versions("torch", "diffusers", *weights_memory.PACKAGES), "forms": forms},
        )


def store_entry(args: argparse.Namespace, options: Sequence[str], entry: str, results: Mapping[str, Any]) -> None:
    """Replace one entry of a base in the result file, and keep all others.

    Args:
        args: arguments of the command line.
        options: the entry's own arguments, for its command.
        entry: key of the entry.
        results: results to store.
    """
    record = json.loads(args.output.read_text()) if args.output.exists() else {}
    command = shlex.join(["python", "-m", "bench.memory.lean", "--base", args.base, *options])
    record.setdefault(args.base, {})[entry] = {"command": command, "machine": machine(torch.device("cpu")), **results}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


class Target(NamedTuple):
    """Targets of a base's best rung. Pictures smaller than 512² have the same targets."""

    peak: float  # MiB
    ratio: float
    cosine: float

    @staticmethod
    def of(base: str) -> Target:
        """Return the targets of a base."""
        return Target(TARGETS[base] * 2**10, RATIO, COSINE)

    def met(self, peak: float, ratio: float, cosine: float) -> bool:
        """Return whether all three targets are met.

        Args:
            peak: peak memory in MiB.
            ratio: CPU seconds over those of the compared rung.
            cosine: cosine of the gradient to that of the compared rung.
        """
        return peak <= self.peak and ratio <= self.ratio and cosine >= self.cosine


HEADS = ("imports", "   base", "tensors", "   peak", "CPU s", "× truth", " cosine")


def format_row(name: str, results: dict[str, float], truth: dict[str, float], target: Target) -> str:
    """Format one line of the table.

    Args:
        name: name of the rung.
        results: results of the rung.
        truth: results of the compared rung.
        target: the targets.
    """
    sizes = "".join(f"{results[key] / 2**20:9.0f}" for key in ("imports", "base", "tensors", "peak"))
    ratio = results["cpu_seconds"] / truth["cpu_seconds"]
    verdict = "  met" if target.met(results["peak"] / 2**20, ratio, results["cosine"]) else ""
    return f"{name:30}{sizes}{results['cpu_seconds']:7.1f}{ratio:9.2f}{results['cosine']:10.5f}{verdict}"


if __name__ == "__main__":
    main()
