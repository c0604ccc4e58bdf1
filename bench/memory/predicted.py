"""Check the predicted memory footprint and time of a training step against measurements.

The peak of every configuration is predicted on the meta device. Then a new low-memory process (`common.low_memory`)
maps a packed base with random weights, runs one private step of the trainer itself (`training.cohort.train`), with one
picture per entry of the pass, and reports its peak resident memory (VmHWM) since its first import.

    anther bench predicted [--only NAME …] [--full] [--measured JSON]

The kernels' workspace was fitted on single operations, and no parameter was fitted on these networks. The memory of a
process besides the network (Python, PyTorch, kernels once used, and memory that the allocator can't return) is measured
minus predicted memory of a network of 4 million parameters. It is part of every prediction; `net` excludes it on both
sides.

Seconds are CPU time of one pass on one core, compared with those that `client.planning.plan_search` derives from the
footprint and this machine's rates, which `client.cli.benchmark` measures first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.lib.workloads import schedule
from client.cli import benchmark
from client.planning.plan_search import pass_seconds
from common import low_memory
from common.units import MIB
from conf.schemas.planning import DeviceProfileConfig, compose_plan
from models.base.pack import pack
from models.diffusion.denoiser import Denoiser
from models.families.known import KNOWN_BASES, BaseSpec
from models.families.stable_diffusion import STABLE_DIFFUSION
from models.footprint.footprint import Footprint, example_shapes, footprint, meta_denoiser
from models.lora.adapter import init_adapter
from models.quantization import packed
from privacy.noise import SimulatedNoise
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainJob
from training.passes import gradients

MEMORY_BUDGET = 2**40  # bytes, above any use, because the peak is measured
MAX_OVER, MAX_UNDER = 0.10, 0.05  # largest relative error of a predicted peak, above and below
MAX_SECONDS_ERROR = 0.25  # largest relative error of predicted seconds
CALIBRATION = 40.0  # seconds to measure the machine's rates


@dataclass(frozen=True)
class FootprintCase:
    """Network and options of its step."""

    network: str  # key of NETWORKS
    resolution: int
    weights: str = "fp32"
    checkpointing: str = "none"
    batch: int = 1
    rank: int = 8
    sites: str | None = None  # see `models.diffusion.sites`

    @property
    def name(self) -> str:
        """Short unique name."""
        return f"{self.network} {self.resolution}² {self.weights} {self.checkpointing} ×{self.batch} r{self.rank}"

    @property
    def base(self) -> BaseSpec:
        """Configuration of the network."""
        return NETWORKS[self.network]


class MeasuredStep(NamedTuple):
    """Measurements of one step."""

    peak_bytes: int
    seconds: float  # of the pass


def _unet(*widths: int, attending: int | None = None, **config: Any) -> BaseSpec:
    """Describe a UNet with cross-attention in its first blocks, or in all of them."""
    blocks = len(widths)
    attending = blocks if attending is None else attending
    down = ("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",) * (blocks - attending)
    up = ("UpBlock2D",) * (blocks - attending) + ("CrossAttnUpBlock2D",) * attending
    plain = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": widths}
    return BaseSpec(family=STABLE_DIFFUSION, config={**plain, "down_block_types": down, "up_block_types": up, **config})


def _like(name: str, **config: Any) -> BaseSpec:
    return replace(KNOWN_BASES[name], config={**KNOWN_BASES[name].config, **config})


NETWORKS: Mapping[str, BaseSpec] = {
    "runtime": _unet(64, 128, layers_per_block=1),
    "unet-142M": _unet(128, 256, 512, 512, attending=3),
    "unet-34M": _unet(128, 192, 256, cross_attention_dim=128),
    "bk-sdm-thin": _like("bk-sdm-tiny", block_out_channels=(160, 320, 640)),
    "sdxl-thin": _like(
        "sdxl",
        block_out_channels=(96, 192, 384),
        attention_head_dim=(3, 6, 12),
        transformer_layers_per_block=(1, 1, 4),
        cross_attention_dim=1024,
    ),
    "pixart-60M": _like(
        "pixart-sigma", num_layers=8, num_attention_heads=8, cross_attention_dim=576, caption_channels=1024
    ),
    "sd3-80M": _like(
        "sd35-medium",
        num_layers=6,
        num_attention_heads=8,
        caption_projection_dim=512,
        joint_attention_dim=1024,
        pos_embed_max_size=96,
        dual_attention_layers=(0, 1, 2),
    ),
    "flux-90M": _like("flux-dev", num_layers=3, num_single_layers=4, num_attention_heads=4, joint_attention_dim=1024),
    "sana-70M": _like(
        "sana-600m",
        num_layers=8,
        num_attention_heads=16,
        num_cross_attention_heads=8,
        cross_attention_head_dim=64,
        cross_attention_dim=512,
        caption_channels=1024,
    ),
    **KNOWN_BASES,
}
RUNTIME = FootprintCase("runtime", 256, "int8", "block")
OPTIONS = (
    (512, "fp32", "none"),
    (512, "fp32", "block"),
    (512, "int8", "none"),
    (512, "mixed", "block"),
    (256, "nf4", "none"),
    (256, "nf4", "block"),
)
SANA_OPTIONS = tuple(
    (2 * side, weights, checkpointing) for side, weights, checkpointing in OPTIONS
)  # latents of side/16
CASES = (
    *(FootprintCase(name, *options) for name in list(NETWORKS)[1:8] for options in OPTIONS),
    *(FootprintCase("sana-70M", *options) for options in SANA_OPTIONS),
    FootprintCase("unet-34M", 256, "fp32", "none", batch=3),
    FootprintCase("unet-34M", 384, "int8", "block", batch=2, rank=32),
    FootprintCase("pixart-60M", 256, "mixed", "none", batch=4),
    FootprintCase("flux-90M", 512, "int8", "block", batch=2),
)
FULL = (
    FootprintCase("bk-sdm-small", 512, "int8", "block"),
    FootprintCase("sd15", 512, "mixed", "block"),
    FootprintCase("pixart-sigma", 512, "nf4", "block"),
)  # minutes for each
KNOWN_CASES = {case.name: case for case in (RUNTIME, *CASES, *FULL)}


def predict(case: FootprintCase) -> Footprint:
    """Predict the footprint from shapes, without the runtime."""
    base = case.base
    denoiser = meta_denoiser(
        base, sites=case.sites or base.family.sites, weights=case.weights, checkpointing=case.checkpointing
    )
    return footprint(denoiser, *example_shapes(base, case.resolution), rank=case.rank, batch=case.batch)


def prepare(network: str, folder: Path, modes: Iterable[str]) -> None:
    """Write a pipeline folder with random weights, and pack it in each mode, in a folder of the mode's name.

    Args:
        network: key of `NETWORKS`.
        folder: folder for the source and the packed bases.
        modes: modes to pack.
    """
    import diffusers

    known, source = NETWORKS[network], folder / "source"
    torch.manual_seed(0)
    model: Any = getattr(diffusers, known.family.kind)(**known.config)
    model.save_pretrained(source / known.family.network)
    index = {"_class_name": known.family.pipeline, known.family.network: ["diffusers", known.family.kind]}
    (source / "model_index.json").write_text(json.dumps(index))
    del model
    for mode in modes:
        pack(str(source), folder / mode, mode)


def measure_case(case: FootprintCase, folder: Path) -> MeasuredStep:
    """Run one step of a packed base in this process, and return the process's peak and the pass's seconds."""
    base = case.base
    network = packed.load(folder / case.weights / base.family.network, base.family.kind)
    cpu = torch.device("cpu")
    denoiser = Denoiser(
        network,
        schedule(cpu),
        sites=case.sites or base.family.sites,
        checkpointing=case.checkpointing,
        forward=base.family.forward,
    )
    latents, context = example_shapes(base, case.resolution)
    job = TrainJob(
        client="device",
        round=1,
        purpose="shared",
        seed=0,
        start=init_adapter(denoiser.sites, case.rank, seed=0),
        steps=1,
        examples=Examples(torch.randn(case.batch, *latents), torch.ones(case.batch, *context)),
        batch_size=case.batch,
        learning_rate=1e-3,
        privacy=DPSGD(noise_multiplier=1.0, clip=0.01, sampling_rate=1.0),
        noise=SimulatedNoise(seed=0, client="device", round=1, purpose="shared"),
        names=tuple(map(str, range(case.batch))),
    )
    seconds: list[float] = []

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        result = gradients(*arguments)
        seconds.append(time.process_time() - started)
        return result

    with patch("training.cohort.gradients", timed):
        outcome = train(denoiser, [job], memory=MEMORY_BUDGET, timesteps=1)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return MeasuredStep(_peak(), sum(seconds))


def measure_rates() -> DeviceProfileConfig:
    """Measure this machine's rates on one core."""
    return benchmark.measure(compose_plan(["device=laptop"], Path()).device, CALIBRATION)


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def run_child(*arguments: str) -> str:
    """Run this module in a low-memory process, and return its last line of output."""
    command = [sys.executable, "-m", "bench.memory.predicted", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **low_memory.ENVIRONMENT}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(arguments)}: {process.stderr[-2000:]}")
    return process.stdout.strip().splitlines()[-1] if process.stdout.strip() else ""


def measure_in_processes(cases: Sequence[FootprintCase]) -> Iterator[tuple[FootprintCase, MeasuredStep]]:
    """Measure each case in a new process; each network is packed once and deleted after its last case."""
    for network in dict.fromkeys(case.network for case in cases):
        network_cases = [case for case in cases if case.network == network]
        with tempfile.TemporaryDirectory() as folder:
            run_child("--prepare", network, "--folder", folder, "--modes", *{case.weights for case in network_cases})
            for case in network_cases:
                yield case, MeasuredStep(*json.loads(run_child("--measure", case.name, "--folder", folder)))


def result_row(case: FootprintCase, runtime: int, device: DeviceProfileConfig, step: MeasuredStep) -> dict[str, Any]:
    """Convert a prediction and its measurement to a row of the result file, with the relative errors.

    Args:
        case: network and options of the step.
        runtime: bytes of the runtime.
        device: rates of the machine.
        step: measurements of the step.
    """
    parts = predict(case)
    total, seconds = parts.peak_bytes + runtime, pass_seconds(parts, device)
    return {
        "case": case.name,
        "parts": vars(parts) | {"runtime_bytes": runtime},
        "predicted_bytes": total,
        "measured_bytes": step.peak_bytes,
        "error": total / step.peak_bytes - 1,
        "net_error": parts.peak_bytes / (step.peak_bytes - runtime) - 1,
        "predicted_seconds": seconds,
        "measured_seconds": step.seconds,
        "seconds_error": seconds / step.seconds - 1,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, and return the exit status: 1 if a prediction is out of bounds."""
    parser = argparse.ArgumentParser(prog="anther bench predicted", description=(__doc__ or "").split("\n\n")[1])
    for hidden in ("--measure", "--prepare", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--modes", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="run only cases with these prefixes")
    parser.add_argument("--full", action="store_true", help="include networks of full size: minutes for each, and 7 GB")
    parser.add_argument("--measured", type=Path, metavar="JSON", help="result file whose measurements are used again")
    parser.add_argument("--output", type=Path, default=Path("bench/results/predicted.json"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.prepare:
        prepare(args.prepare, Path(args.folder), args.modes)
        return 0
    if args.calibrate:
        print(json.dumps(dataclasses.asdict(measure_rates())))
        return 0
    if args.measure:
        with low_memory.imports():
            print(json.dumps(measure_case(KNOWN_CASES[args.measure], Path(args.folder))))
        return 0
    selected = [case for case in (*CASES, *(FULL if args.full else ())) if case.name.startswith(tuple(args.only))]
    device, steps = _read_measurements(args.measured) if args.measured else (None, {})
    device = device or DeviceProfileConfig(**json.loads(run_child("--calibrate")))
    missing = [case for case in (RUNTIME, *selected) if case.name not in steps]
    for case, step in measure_in_processes(missing):
        steps[case.name] = step
        print(f"{case.name}: {step.peak_bytes / MIB:,.0f} MiB, {step.seconds:.1f} s", file=sys.stderr)
    runtime = steps[RUNTIME.name].peak_bytes - predict(RUNTIME).peak_bytes
    rows = [result_row(case, runtime, device, steps[case.name]) for case in selected]
    Console(width=140).print(table(rows))
    sound = all(
        -MAX_UNDER <= entry["error"] <= MAX_OVER and abs(entry["seconds_error"]) <= MAX_SECONDS_ERROR for entry in rows
    )
    record = {
        "command": shlex.join(
            ["python", "-m", "bench.memory.predicted", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "diffusers"),
        "environment": low_memory.ENVIRONMENT,
        "runtime_bytes": runtime,
        "runtime_measured": steps[RUNTIME.name],
        "device": dataclasses.asdict(device),
        "within_bounds": sound,
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if sound else 1


def _read_measurements(path: Path) -> tuple[DeviceProfileConfig, dict[str, MeasuredStep]]:
    """Read an earlier run's rates and measurements, by name of the case."""
    record = json.loads(path.read_text())
    measured = {row["case"]: MeasuredStep(row["measured_bytes"], row["measured_seconds"]) for row in record["rows"]}
    return DeviceProfileConfig(**record["device"]), {RUNTIME.name: MeasuredStep(*record["runtime_measured"])} | measured


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of all cases in MiB."""
    result = Table(title="Peak resident memory of one step, MiB, and seconds of its pass", title_justify="left")
    result.add_column("case")
    for heading in (
        "base",
        "activations",
        "workspace",
        "adapter",
        "runtime",
        "predicted",
        "measured",
        "error",
        "net",
        "seconds",
        "error",
    ):
        result.add_column(heading, justify="right")
    for row in rows:
        parts = row["parts"]
        adapter = parts["adapter_bytes"] + parts["optimiser_bytes"]
        runtime = parts["objects_bytes"] + parts["runtime_bytes"]
        bytes_ = [parts["base_bytes"], parts["activations_bytes"], parts["workspace_bytes"], adapter]
        bytes_ += [runtime, row["predicted_bytes"], row["measured_bytes"]]
        mib = [f"{value / MIB:,.0f}" for value in bytes_]
        errors = [f"{row[key]:+.1%}" for key in ("error", "net_error", "seconds_error")]
        result.add_row(row["case"], *mib, *errors[:2], f"{row['measured_seconds']:.1f}", errors[2])
    return result


if __name__ == "__main__":
    sys.exit(main())
