"""One private step of Stable Diffusion 1.5's UNet in as little memory as there need be:  python -m bench.lean

Every rung of the ladder is a process of its own, and takes one lever more than the one before. Weights are random: what
a step takes doesn't depend on them, but gradients are compared with those of the first rung, which has nothing but
float32. Peaks are the process' own high-water mark: Python, its libraries and the pages of mapped files are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.machine import machine, versions
from bench.workloads import RANK, SITES, TOKENS, WORKLOADS, Workload, build, schedule
from conf import lean
from models import packed
from models.adapter import Adapter, Factors, Sites, initial
from models.denoiser import Denoiser
from models.pack import pack
from privacy.noise import Simulated
from training import trainer
from training.capacity import entry_bytes
from training.jobs import DPSGD, Examples, Train
from training.rows import Shape

RESULTS = Path(__file__).parent / "results" / "lean.json"
MEMORY = 64 << 30  # granted: the process' own peak is what is measured


@dataclass(frozen=True)
class Rung:
    """One way to take a step."""

    weights: str = "fp32"
    blocks: bool = False  # run again in backward
    pages: bool = False  # of the mapped base, given back
    imports: bool = False  # only what a network needs
    allocator: bool = False  # told before Python starts


RUNGS = {
    "float32": Rung(),
    "float32, blocks": Rung(blocks=True),
    "int8": Rung("int8"),
    "mixed": Rung("mixed"),
    "mixed, pages": Rung("mixed", pages=True),
    "mixed, pages, blocks": Rung("mixed", pages=True, blocks=True),
    "mixed, pages, blocks, imports": Rung("mixed", pages=True, blocks=True, imports=True),
    "mixed, everything": Rung("mixed", pages=True, blocks=True, imports=True, allocator=True),
    "int8, everything": Rung("int8", pages=True, blocks=True, imports=True, allocator=True),
    "nf4, everything": Rung("nf4", pages=True, blocks=True, imports=True, allocator=True),
}


class Always(Simulated):
    """Noise that anyone can make again, and a batch of every picture."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)


def start(sites: Sites) -> Adapter:
    """An adapter whose B is not zero: else A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    fresh = initial(sites, RANK, seed=0)
    return {name: Factors(a, torch.randn(b.shape, generator=generator) * 0.02) for name, (a, b) in fresh.items()}


def private_step(sites: Sites, workload: Workload, side: int) -> Train:
    """One step on one picture."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, workload.latent[0], side, side, generator=generator)
    context = torch.randn(1, TOKENS, workload.width, generator=generator)
    return Train(
        client="one", round=0, purpose="shared", seed=0, examples=Examples(latents, context), start=start(sites),
        steps=1, batch_size=1, learning_rate=1e-3, privacy=DPSGD(noise_multiplier=1.0, clip=0.01, sampling_rate=1.0),
        noise=Always(seed=0, client="one", round=0, purpose="shared"), names=("one",),
    )  # fmt: skip


def memory(key: str) -> int:
    """Bytes of VmRSS, VmHWM, RssAnon or RssFile of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(workload: Workload, rung: Rung, folder: Path, side: int, gradient: Path) -> dict[str, float]:
    """One rung, in this process: bytes and seconds; leaves its gradient in a file."""
    if rung.imports:
        with lean.imports():
            import diffusers.models.unets.unet_2d_condition
    else:
        import diffusers.models.unets.unet_2d_condition  # noqa: F401
    found: dict[str, float] = {"imports": memory("VmRSS")}
    cpu, seen = torch.device("cpu"), []
    if rung.weights == "fp32":
        network = build(workload, cpu)
    else:
        with nullcontext() if rung.pages else patch("models.paging.mark", lambda tensor: tensor):
            network = packed.load(folder / rung.weights / "unet", "UNet2DConditionModel")
    found["base"] = memory("VmRSS") - found["imports"]
    checkpointing = "block" if rung.blocks else "none"
    denoiser = Denoiser(network, schedule(cpu), sites=SITES, checkpointing=checkpointing)
    job, plain = private_step(denoiser.sites, workload, side), trainer.gradients

    def spy(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        result = plain(*arguments, **options)
        seen.append(result[0].clone())
        return result

    found["tensors"] = entry_bytes(denoiser, Shape.of([job]))  # counts on a pass of its own, which the step spares then
    before, began = time.process_time(), time.perf_counter()
    with patch("training.trainer.gradients", spy):
        (outcome,) = trainer.train(denoiser, [job], memory=MEMORY, timesteps=1)
    found |= {"cpu_seconds": time.process_time() - before, "seconds": time.perf_counter() - began}
    if isinstance(outcome, Exception):
        raise outcome
    found |= {"peak": memory("VmHWM"), "loss": outcome.loss}
    torch.save(seen[0], gradient)
    return found


def prepare(workload: Workload, folder: Path, modes: set[str]) -> None:
    """A pipeline's folder with the workload's random weights, and its packs."""
    source = folder / "source"
    if not source.exists():
        network: Any = build(workload, torch.device("cpu"))
        network.save_pretrained(source / "unet")
        (source / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    for mode in modes:
        if mode != "fp32" and not (folder / mode).exists():
            pack(str(source), folder / mode, mode)


def child(*arguments: str, allocator: bool = False) -> str:
    """What another process of this module prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(lean.ENVIRONMENT if allocator else {})}
    command = [sys.executable, "-m", "bench.lean", *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="sd15", choices=WORKLOADS)
    parser.add_argument("--side", type=int, default=64, help="of the latents: 64 is a picture of 512²")
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS), help=f"of: {'; '.join(RUNGS)}")
    parser.add_argument("--folder", type=Path, help="keeps the packed bases for the next run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    workload = WORKLOADS[given.workload]
    if given.prepare:
        prepare(workload, given.folder, {RUNGS[name].weights for name in given.rungs})
    elif given.one:
        gradient = given.folder / f"{given.one}-{given.side}.pt"
        print(json.dumps(measure(workload, RUNGS[given.one], given.folder, given.side, gradient)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            ladder(given, (given.folder or Path(scratch)) / workload.name)


def ladder(given: argparse.Namespace, folder: Path) -> None:
    """Every rung, its table and its record, which grows with each."""
    names = ["float32", *(name for name in given.rungs if name != "float32")]  # the others are compared with it
    common = ["--workload", given.workload, "--folder", str(folder), "--side", str(given.side)]
    child("--prepare", *common, "--rungs", *names)
    print(f"{given.workload}, latents of {given.side}², MiB" + " " * 6, *HEADS, sep="  ")
    rungs: dict[str, dict[str, float]] = {}
    for name in names:
        found = json.loads(child("--one", name, *common, allocator=RUNGS[name].allocator))
        one, truth = (torch.load(folder / f"{each}-{given.side}.pt").double().flatten() for each in (name, "float32"))
        found["cosine"] = float(one @ truth / (one.norm() * truth.norm()))
        rungs[name] = found
        print(row(name, found, rungs["float32"]), flush=True)
        record = {
            "command": " ".join(["python -m bench.lean", *sys.argv[1:]]), "workload": given.workload,
            "side": given.side, "machine": machine(torch.device("cpu")), "versions": versions("torch", "diffusers"),
            "rungs": {each: {**asdict(RUNGS[each]), **rungs[each]} for each in RUNGS if each in rungs},
        }  # fmt: skip
        given.output.write_text(json.dumps(record, indent=1) + "\n")


HEADS = ("imports", "   base", "tensors", "   peak", "CPU s", "  × fp32", " cosine")


def row(name: str, found: dict[str, float], first: dict[str, float]) -> str:
    """One line of the table."""
    sizes = "".join(f"{found[key] / 2**20:9.0f}" for key in ("imports", "base", "tensors", "peak"))
    ratio = found["cpu_seconds"] / first["cpu_seconds"]
    return f"{name:30}{sizes}{found['cpu_seconds']:7.1f}{ratio:9.2f}{found['cosine']:10.5f}"


if __name__ == "__main__":
    main()
