"""Does the predicted footprint hold?  python -m bench.predicted [--only NAME …] [--full] [--measured JSON]

Of every configuration the peak is predicted on the meta device; then a fresh process builds it with random weights,
takes one training step, and tells its peak resident memory (VmHWM, reset once the network is built and packed: how it
gets there is another matter). The kernels' workspace was fitted on single operations, nothing on any of these networks.
What a process holds beside that (Python, PyTorch, kernels once they are in use, and what the allocator can't give back)
is found on a network of 4 million parameters, as measured less predicted, and is part of every prediction; `net` leaves
it out on both sides.

UNets take a step of the trainer itself, `training.trainer.train`, private, with one picture for each entry of the pass;
transformers, for which there is no base yet, its forward and backward pass alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.machine import machine, versions
from bench.workloads import schedule
from models.adapter import initial
from models.architectures import ATTENTION, BUILT_IN, Architecture
from models.denoiser import Denoiser, find_sites
from models.footprint import Footprint, footprint, one_pass, prepare
from models.slots import Layout, add_slots
from privacy.noise import Simulated
from training.jobs import DPSGD, Examples, Train
from training.trainer import train

MIB = 2**20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # tensors go back to the system when they die
OVER, UNDER = 0.10, 0.05  # how far a prediction may lie above and below what was measured


@dataclass(frozen=True)
class Case:
    """One network, and how a step of it is taken."""

    architecture: Architecture
    resolution: int
    weights: str = "fp32"
    checkpointing: str = "none"
    batch: int = 1
    rank: int = 8

    @property
    def name(self) -> str:
        """Short, and its own."""
        kept = f"{self.weights} {self.checkpointing} ×{self.batch} r{self.rank}"
        return f"{self.architecture.name} {self.resolution}² {kept}"


def _unet(name: str, **config: Any) -> Architecture:
    return Architecture(name, "UNet2DConditionModel", {"cross_attention_dim": 768, "attention_head_dim": 8, **config})


def _smaller(name: str, like: str, **config: Any) -> Architecture:
    return replace(BUILT_IN[like], name=name, config={**BUILT_IN[like].config, **config})


SMALL = _unet(
    "unet-4M", block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=1,
)  # fmt: skip
UNETS = (
    _unet("unet-142M", block_out_channels=(128, 256, 512, 512)),
    _unet(
        "unet-34M", block_out_channels=(128, 192, 256), cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
    ),
    _smaller("bk-sdm-thin", "bk_sdm_tiny", block_out_channels=(160, 320, 640)),
)  # fmt: skip
TRANSFORMERS = (
    _smaller(
        "pixart-60M", "pixart_sigma", num_layers=8, num_attention_heads=8, cross_attention_dim=576,
        caption_channels=1024,
    ),
    _smaller("sd3-80M", "sd35_medium", num_layers=6, num_attention_heads=8, caption_projection_dim=512,
             joint_attention_dim=1024, pos_embed_max_size=96, dual_attention_layers=(0, 1, 2)),
    _smaller("flux-90M", "flux_dev", num_layers=3, num_single_layers=4, num_attention_heads=4,
             joint_attention_dim=1024),
    _smaller("sana-70M", "sana_600m", num_layers=8, num_attention_heads=16, num_cross_attention_heads=8,
             cross_attention_head_dim=64, cross_attention_dim=512, caption_channels=1024),
)  # fmt: skip
CASES = (
    *(
        Case(architecture, 256, weights, checkpointing)
        for architecture in UNETS
        for weights in ("fp32", "int8")
        for checkpointing in ("none", "block")
    ),
    Case(UNETS[0], 512, "int8", "block"),
    Case(UNETS[1], 256, "fp32", "none", batch=3),
    Case(UNETS[1], 384, "int8", "block", batch=2, rank=32),
    Case(UNETS[2], 512, "fp32", "none"),
    *(
        Case(architecture, 512, weights, checkpointing)
        for architecture in TRANSFORMERS
        for weights, checkpointing in (("fp32", "none"), ("fp32", "block"), ("int8", "block"))
    ),
    Case(TRANSFORMERS[0], 256, "fp32", "none", batch=4),
    Case(TRANSFORMERS[2], 768, "int8", "block", batch=2),
)
FULL = (
    Case(BUILT_IN["bk_sdm_small"], 512, "int8", "block"),
    Case(BUILT_IN["sd15"], 256, "int8", "block"),
    Case(BUILT_IN["sd15"], 512, "int8", "block"),
    Case(BUILT_IN["sd15"], 512, "fp32", "none"),
    Case(BUILT_IN["pixart_sigma"], 512, "int8", "block"),
)  # minutes each


def predicted(case: Case) -> Footprint:
    """From shapes alone, without the runtime."""
    network = case.architecture.build()
    sites = prepare(network, sites=ATTENTION, weights=case.weights, checkpointing=case.checkpointing)
    inputs = case.architecture.inputs(case.resolution)
    return footprint(network, inputs, sites=sites, rank=case.rank, batch=case.batch)


def measured(case: Case) -> int:
    """Bytes: the peak of one step, in this process."""
    network = case.architecture.build().to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        nn.init.normal_(tensor, std=0.02)
    if case.checkpointing == "block":
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    step = _trained if case.architecture.kind == "UNet2DConditionModel" else _passed
    return step(network, case)


def _trained(network: nn.Module, case: Case) -> int:
    base = Denoiser(network, schedule(torch.device("cpu")), sites=ATTENTION, int8=case.weights == "int8")
    shapes = case.architecture.inputs(case.resolution)(case.batch)
    job = Train(
        client="device", round=1, purpose="shared", seed=0, start=initial(base.sites, case.rank, seed=0), steps=1,
        examples=Examples(torch.randn_like(shapes["sample"]), torch.randn_like(shapes["encoder_hidden_states"])),
        batch_size=case.batch, learning_rate=1e-3,
        privacy=DPSGD(noise_multiplier=1.0, clip=0.01, sampling_rate=1.0),
        noise=Simulated(seed=0, client="device", round=1, purpose="shared"),
        names=tuple(map(str, range(case.batch))),
    )  # fmt: skip
    _reset_peak()
    found = train(base, [job], memory=2**40, timesteps=1)[0]
    if isinstance(found, Exception):
        raise found
    return _peak()


def _passed(network: nn.Module, case: Case) -> int:
    sites = find_sites(network, ATTENTION)
    if case.weights == "int8":
        from models.quantise import quantise_layers

        quantise_layers(network)
    add_slots(network, sites)
    network.requires_grad_(False).eval()
    layout = Layout(sites, case.rank)
    rows, others = torch.randn(case.batch, layout.size), torch.ones(3, layout.size)  # these a step would need
    _reset_peak()
    one_pass(network, case.architecture.inputs(case.resolution), rows, layout)
    del others
    return _peak()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def in_fresh_process(case: Case) -> int:
    """The same in a process of its own."""
    name = "runtime" if case == RUNTIME else case.name
    command = [sys.executable, "-m", "bench.predicted", "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ALLOCATOR)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


RUNTIME = Case(SMALL, 256, "int8", "block")
KNOWN = {"runtime": RUNTIME} | {case.name: case for case in (*CASES, *FULL)}


def row(case: Case, runtime: int, found: int) -> dict[str, Any]:
    """What is predicted and was found of one case, in bytes, and by how much the prediction is over."""
    parts = predicted(case)
    total = parts.peak_bytes + runtime
    return {
        "case": case.name,
        "parts": vars(parts) | {"runtime_bytes": runtime},
        "predicted_bytes": total,
        "measured_bytes": found,
        "error": total / found - 1,
        "net_error": parts.peak_bytes / (found - runtime) - 1,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 1 if a prediction lies out of bounds."""
    parser = argparse.ArgumentParser(prog="python -m bench.predicted", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--measure", choices=KNOWN, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="those whose name begins so")
    parser.add_argument("--full", action="store_true", help="networks of full size too: minutes each, and 7 GB")
    parser.add_argument(
        "--measured", type=Path, metavar="JSON", help="predict again; what it measured is taken from it"
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results/predicted.json"))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.measure:
        print(measured(KNOWN[asked.measure]))
        return 0
    known = _known(asked.measured) if asked.measured else {}
    smallest = known.get("runtime") or in_fresh_process(RUNTIME)
    runtime = smallest - predicted(RUNTIME).peak_bytes
    rows = []
    for case in (*CASES, *(FULL if asked.full else ())):
        if case.name.startswith(tuple(asked.only)):
            rows.append(row(case, runtime, known.get(case.name) or in_fresh_process(case)))
            print(f"{case.name}: {rows[-1]['error']:+.1%}, net {rows[-1]['net_error']:+.1%}", file=sys.stderr)
    Console(width=130).print(table(rows))
    sound = all(-UNDER <= found["error"] <= OVER for found in rows)
    record = {
        "command": shlex.join(["python", "-m", "bench.predicted", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "diffusers"),
        "allocator": ALLOCATOR,
        "runtime_bytes": runtime,
        "runtime_peak_bytes": smallest,
        "within_bounds": sound,
        "rows": rows,
    }
    asked.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if sound else 1


def _known(path: Path) -> dict[str, int]:
    """The bytes that an earlier run measured, by the names of its cases."""
    record = json.loads(path.read_text())
    return {"runtime": record["runtime_peak_bytes"]} | {row["case"]: row["measured_bytes"] for row in record["rows"]}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every case in MiB."""
    found = Table(title="Peak resident memory of one step, MiB", title_justify="left")
    found.add_column("case")
    for heading in ("base", "activations", "workspace", "adapter", "runtime", "predicted", "measured", "error", "net"):
        found.add_column(heading, justify="right")
    for each in rows:
        parts = each["parts"]
        adapter = parts["adapter_bytes"] + parts["optimiser_bytes"]
        bytes_ = [parts["base_bytes"], parts["activations_bytes"], parts["workspace_bytes"], adapter]
        bytes_ += [parts["runtime_bytes"], each["predicted_bytes"], each["measured_bytes"]]
        mib = [f"{value / MIB:,.0f}" for value in bytes_]
        found.add_row(each["case"], *mib, f"{each['error']:+.1%}", f"{each['net_error']:+.1%}")
    return found


if __name__ == "__main__":
    sys.exit(main())
