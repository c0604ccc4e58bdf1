"""Cost and accuracy of the exact mean of LoRA products.

    anther bench aggregation

- Time: one round over the attention layers of Stable Diffusion 1.5, in CPU seconds of one core, against a dense
  computation of the same mean: the products summed into [out, in] matrices, and an SVD of each. One layer of each
  shape is timed, by its fastest run, and multiplied by the number of such layers in the network.
- Memory: a whole round in one process, devices added one at a time, for increasing numbers of devices.
- Error: devices of ranks 2, 4, 8 and 16, relative to the true mean, against the best approximation of the same rank and
  against FedIT with zero-padded factors, truncated to that rank.

Factors are synthetic: all devices start from the same A, share a part of B, and drift from both. Errors are also
measured on real updates: two rounds of development writers' devices on the glyph base (`bench.quality.updates`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.lib.machine import machine, memory, versions
from bench.quality import updates
from bench.quality.updates import best_approximation
from common.units import MIB
from models.lora.adapter import Adapter, Factors
from strategies.aggregation.exact import Exact

RESULTS = Path(__file__).parents[1] / "results" / "aggregation.json"
LAYERS = {(320, 320): 30, (768, 320): 10, (640, 640): 30, (768, 640): 10, (1280, 1280): 36, (768, 1280): 12}
"""Attention layers of Stable Diffusion 1.5 by (in, out): 16 blocks, each with 6 square layers and 2 from text."""
DEVICES, RANK, CAP = 100, 8, 16
MEMORY_DEVICES = (10, 100, 1000)  # numbers of devices whose memory is measured
MIXED = (2, 4, 8, 16)
TARGET_RATIO, TARGET_ERROR = 20.0, 1.05  # targets: dense seconds over exact seconds; exact error over the best error


def layer_factors(inputs: int, outputs: int, ranks: list[int], seed: int) -> Iterator[Factors]:
    """Yield each device's factors at one layer, as after a few steps from a common start.

    Args:
        inputs: input features of the layer.
        outputs: output features of the layer.
        ranks: rank of each device's factors.
        seed: seed of the random numbers.

    Yields:
        A `[rank, inputs]` and B `[outputs, rank]` of one device.
    """
    generator = torch.Generator().manual_seed(seed)
    max_rank = max(ranks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a, b = normal(max_rank, inputs) / inputs**0.5, normal(outputs, max_rank)
    for rank in ranks:
        drift = normal(rank, inputs) / inputs**0.5
        yield Factors(a[:rank] + 0.5 * drift, b[:, :rank] + normal(outputs, rank))


def start(inputs: int, outputs: int, rank: int) -> Adapter:
    """Return a zero adapter.

    Args:
        inputs: input features of its layer.
        outputs: output features of its layer.
        rank: rank of the adapter.
    """
    return {"layer": Factors(torch.zeros(rank, inputs), torch.zeros(outputs, rank))}


def exact(inputs: int, outputs: int, factors: list[Factors], cap: int) -> Tensor:
    """Return the mean of `aggregation=exact` as a matrix `[outputs, inputs]`.

    Args:
        inputs: input features of the layer.
        outputs: output features of the layer.
        factors: A and B of each device.
        cap: rank of the result.
    """
    rule = Exact(rank=cap, max_rank=cap, seed=0)
    result = rule.aggregate(start(inputs, outputs, cap), [({"layer": f}, 1.0) for f in factors], round=1)
    return result.adapter["layer"].b.double() @ result.adapter["layer"].a.double()


def dense_mean(inputs: int, outputs: int, factors: list[Factors], cap: int) -> tuple[Tensor, Tensor]:
    """Return the same mean by a dense matrix and its SVD, in float32 like the factors.

    Args:
        inputs: input features of the layer.
        outputs: output features of the layer.
        factors: A and B of each device.
        cap: rank of the result.

    Returns:
        The factors `[outputs, cap]` and `[cap, inputs]`.
    """
    mean = torch.zeros(outputs, inputs)
    for a, b in factors:
        mean.addmm_(b, a, alpha=1 / len(factors))
    u, sigma, vh = torch.linalg.svd(mean, full_matrices=False)
    return u[:, :cap] * sigma[:cap], vh[:cap]


def fastest_run(work: Callable[[], Any], seconds: float) -> float:
    """Return the CPU seconds of the fastest of at least five runs, repeated for `seconds` of CPU time."""
    seconds_of_runs: list[float] = []
    while len(seconds_of_runs) < 5 or sum(seconds_of_runs) < seconds:
        started = time.process_time()
        work()
        seconds_of_runs.append(time.process_time() - started)
    return min(seconds_of_runs)


def measure_times(seconds: float) -> dict[str, Any]:
    """Measure the CPU seconds of each layer shape and of all layers."""
    shapes, total = [], {"exact": 0.0, "dense": 0.0}
    for (inputs, outputs), count in LAYERS.items():
        factors = list(layer_factors(inputs, outputs, [RANK] * DEVICES, seed=inputs + outputs))
        rule, adapter = Exact(rank=RANK, max_rank=CAP, seed=0), start(inputs, outputs, RANK)
        updates = [({"layer": f}, 1.0) for f in factors]
        seconds_of = {
            "exact": fastest_run(lambda: rule.aggregate(adapter, updates, round=1), seconds),  # noqa: B023
            "dense": fastest_run(lambda: dense_mean(inputs, outputs, factors, CAP), seconds),  # noqa: B023
        }
        shapes.append({"inputs": inputs, "outputs": outputs, "layers": count, **seconds_of})
        total = {way: total[way] + count * seconds_of[way] for way in total}
    return {"shapes": shapes, **total, "ratio": total["dense"] / total["exact"]}


def measure_peak(devices: int) -> int:
    """Return the peak bytes of a round with this number of devices, above the process's memory before it."""
    layers = {
        f"{inputs}-{outputs}-{number}": (inputs, outputs)
        for (inputs, outputs), count in LAYERS.items()
        for number in range(count)
    }
    current = {name: start(*shape, RANK)["layer"] for name, shape in layers.items()}
    torch.linalg.svd(torch.linalg.qr(torch.randn(64, 32)).R)  # loads the libraries that are loaded on first use
    bytes_before = memory("VmRSS")
    rule = Exact(rank=RANK, max_rank=CAP, seed=0)
    mean = rule.start(current)
    for device in range(devices):
        mean.add({name: next(layer_factors(*shape, [RANK], seed=device)) for name, shape in layers.items()}, 1.0)
    rule.finish(mean, round=1)
    return memory("VmHWM") - bytes_before


def peak_by_devices() -> dict[str, int]:
    """Measure peak bytes by number of devices, each in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.quality.aggregation", "--hold"]
    return {
        str(devices): int(
            subprocess.run([*command, str(devices)], env=environment, check=True, stdout=subprocess.PIPE).stdout
        )
        for devices in MEMORY_DEVICES
    }


def measure_errors() -> list[dict[str, float]]:
    """Compute relative errors for devices of mixed ranks."""
    rows = []
    for inputs, outputs in ((320, 320), (768, 640)):
        for devices in (8, 100):
            factors = list(layer_factors(inputs, outputs, list(MIXED) * (devices // len(MIXED)), seed=devices))
            mean = torch.stack([b.double() @ a.double() for a, b in factors]).mean(0)
            padded_a, padded_b = torch.zeros(max(MIXED), inputs), torch.zeros(outputs, max(MIXED))
            for a, b in factors:
                padded_a[: len(a)] += a / devices
                padded_b[:, : len(a)] += b / devices
            fedit = padded_b.double() @ padded_a.double()
            for cap in MIXED:
                rows.append(
                    {
                        "inputs": inputs,
                        "outputs": outputs,
                        "devices": devices,
                        "rank": cap,
                        "best": _error(best_approximation(mean, cap), mean),
                        "exact": _error(exact(inputs, outputs, factors, cap), mean),
                        "fedit_padded": _error(best_approximation(fedit, cap), mean),
                    }
                )
    return rows


def _error(matrix: Tensor, mean: Tensor) -> float:
    return float(torch.linalg.norm(matrix - mean) / torch.linalg.norm(mean))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per number: the fastest run counts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.hold:
        print(measure_peak(args.hold))
        return
    record = {
        "command": shlex.join(["python", "-m", "bench.quality.aggregation", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch"),
        "target": {"ratio": TARGET_RATIO, "error": TARGET_ERROR},
        "devices": DEVICES,
        "rank": RANK,
        "cap": CAP,
        "cpu_seconds": measure_times(args.seconds),
        "bytes": peak_by_devices(),
        "errors": measure_errors(),
        "typefaces": updates.measure_errors(MIXED),
    }
    show(record)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def show(record: dict[str, Any]) -> None:
    """Print the record as tables."""
    console, seconds = Console(), record["cpu_seconds"]
    table = Table("in × out", "layers", "exact, ms", "dense, ms", "ratio", title=f"{DEVICES} devices of rank {RANK}")
    for row in seconds["shapes"]:
        shape, ratio = f"{row['inputs']} × {row['outputs']}", row["dense"] / row["exact"]
        table.add_row(
            shape, str(row["layers"]), f"{1e3 * row['exact']:.1f}", f"{1e3 * row['dense']:.1f}", f"{ratio:.1f}"
        )
    sums = [f"{1e3 * seconds[way]:.0f}" for way in ("exact", "dense")]
    table.add_row("all", str(sum(LAYERS.values())), *sums, f"{seconds['ratio']:.1f}")
    console.print(table)
    table = Table("devices", "peak, MiB", title="Memory of a round")
    for devices, taken in record["bytes"].items():
        table.add_row(devices, f"{taken / MIB:.0f}")
    console.print(table)
    table = Table("in × out", "devices", "rank", "best", "exact", "of best", "fedit, padded", title="Relative error")
    for row in record["errors"]:
        table.add_row(
            f"{row['inputs']} × {row['outputs']}",
            str(row["devices"]),
            str(row["rank"]),
            f"{row['best']:.4f}",
            f"{row['exact']:.4f}",
            f"{row['exact'] / row['best']:.3f}",
            f"{row['fedit_padded']:.4f}",
        )
    console.print(table)
    table = Table("round", "rank", "best", "exact", "of best, worst site", "fedit, padded", title="On typefaces")
    for row in record["typefaces"]:
        table.add_row(
            str(row["round"]),
            str(row["rank"]),
            f"{row['best']:.4f}",
            f"{row['exact']:.4f}",
            f"{row['of_best']:.3f}",
            f"{row['fedit_padded']:.4f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
