"""Bytes sent in a round, and gain kept with quantized updates.

    anther bench traffic [--gain] [--base sd15] …

Bytes are those of encoded updates including headers, on the shapes of a published base; weights are not needed. A
device trains and sends one of:

    factors   A and B of every site
    B         while A is fixed (ffa, fedsvd, every second round of rolora)
    A         while B is fixed, or stays on the device (fedsa)
    cores     rank² numbers per site, between fixed factors (fedsb)

The whole adapter, A and B, is sent down (compression.download).

    --gain    also runs whole federations on the glyph base, for each method, precision and seed, on development
              writers: the share of the gain at fp32 that the shared adapter keeps, (L_base − L) / (L_base − L_fp32)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.lib.machine import machine, versions
from bench.quality.utility import run_once, share
from models.diffusion.sites import find_sites
from models.families.known import find_base
from models.lora.adapter import Sites, adapter_shapes, from_tensors
from models.lora.trainable import trained_shapes
from protocol import quantization, tensor_codec
from strategies.aggregation.fedsb import FedSB
from strategies.download import encode_download
from strategies.registry import AGGREGATIONS

BYTES = ("bytes_up", "bytes_down")
MAX_BYTES, MIN_GAIN_KEPT = 0.45e6, 0.95
"""Targets: largest bytes of an update, smallest share of the gain."""


class UpdateEncoding(NamedTuple):
    """Encoding of an update, and of the downloaded adapter."""

    precision: str
    keep: float = 1.0
    down: str = "fp32"

    @property
    def name(self) -> str:
        """Description for tables and results."""
        up = self.precision if self.keep == 1 else f"{self.precision}, {self.keep:.0%} of blocks"
        return up if self.down == "fp32" else f"{up}; {self.down} down"

    @property
    def overrides(self) -> list[str]:
        """Hydra overrides of the encoding."""
        return [
            f"compression.upload={self.precision}",
            f"compression.keep_fraction={self.keep}",
            f"compression.download={self.down}",
        ]


FP32 = UpdateEncoding("fp32")
UPLOAD_ENCODINGS = (
    FP32,
    UpdateEncoding("fp16"),
    UpdateEncoding("int8"),
    UpdateEncoding("int4"),
    UpdateEncoding("int4", 0.5),
    UpdateEncoding("int4", 0.25),
)
ENCODINGS = (
    *UPLOAD_ENCODINGS,
    UpdateEncoding("fp32", down="int8"),
    UpdateEncoding("fp32", down="int4"),
    UpdateEncoding("int4", down="int8"),
    UpdateEncoding("int4", down="int4"),
)
TRAINED = {"factors": "both", "B alone": "b", "A alone": "a", "cores": "cores"}
METHODS: Mapping[str, tuple[str, ...]] = {
    "fedit": ("aggregation=fedit",),
    "exact": ("aggregation=exact",),
    "ffa": ("aggregation=ffa",),
    "rolora": ("aggregation=rolora",),
    "cores": ("aggregation=fedsb",),
}
RATES = {"fedit": 0.006, "exact": 0.006, "ffa": 0.006, "rolora": 0.006, "cores": 0.02}
COMMON = (
    "data.role=development",
    "adapter.shared.steps=5",
    "adapter.personal.steps=1",
    "adapter.eval_interval=1",
    "evaluation.baseline_local=false",
    "evaluation.gallery_size=0",
    "evaluation.timesteps=4",
    "adapter.shared.lr_schedule=cosine",
    "tracker=none",
)


def _random_tensors(expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tuple(shape), generator=generator) for name, shape in expected.items()}


def update_bytes(change: Mapping[str, Tensor], encoding: UpdateEncoding) -> int:
    """Return the encoded bytes of an update."""
    if encoding == FP32:  # sends all numbers, also those that did not change
        return len(tensor_codec.encode(change))
    return len(quantization.encode(change, encoding.precision, torch.Generator().manual_seed(0), keep=encoding.keep))


def update_sizes(sites: Sites, rank: int) -> dict[str, dict[str, int]]:
    """Return the bytes of an update by trained part and encoding."""
    changes = {name: _random_tensors(trained_shapes(sites, rank, trains)) for name, trains in TRAINED.items()}
    return {
        name: {encoding.name: update_bytes(change, encoding) for encoding in UPLOAD_ENCODINGS}
        for name, change in changes.items()
    }


def downloads(sites: Sites, rank: int) -> dict[str, int]:
    """Return the bytes of the adapter that is sent down, by precision."""
    adapter = from_tensors(_random_tensors(adapter_shapes(sites, rank)))
    return {
        precision: len(encode_download(adapter, precision).data) for precision in ("fp32", *quantization.PRECISIONS)
    }


def size_table(base: str, rank: int, sizes_of: Mapping[str, Mapping[str, int]]) -> Table:
    """Return a table with a row for each encoding and a column for each trained part.

    Args:
        base: name of the base.
        rank: rank of the adapter.
        sizes_of: bytes by trained part and encoding.
    """
    table = Table(title=f"MB of an update: {base}, rank {rank}; target ≤ {MAX_BYTES / 1e6:g}")
    table.add_column("encoding")
    for name in sizes_of:
        table.add_column(name, justify="right")
    for encoding in UPLOAD_ENCODINGS:
        cells = [sizes_of[name][encoding.name] for name in sizes_of]
        table.add_row(encoding.name, *(f"{count / 1e6:.3f}{' ✓' if count <= MAX_BYTES else ''}" for count in cells))
    return table


def encodings(method: str, precisions: Sequence[str], down: Sequence[str]) -> list[UpdateEncoding]:
    """Return the encodings to run a method with, fp32 first.

    Where factors change directions between rounds, error feedback is impossible, so all blocks are sent. With cores,
    the adapter is sent down whole.

    Args:
        method: key of `METHODS`.
        precisions: precisions of updates to run, in addition to fp32.
        down: precisions of the download to run, in addition to fp32.
    """
    candidates = [
        encoding
        for encoding in ENCODINGS
        if encoding.precision in ("fp32", *precisions) and encoding.down in ("fp32", *down)
    ]
    if not AGGREGATIONS.get(method, FedSB).stable_factors:
        return [encoding for encoding in candidates if encoding.keep == 1]
    return [encoding for encoding in candidates if encoding.down == "fp32"] if method == "cores" else candidates


def command(method: str, encoding: UpdateEncoding, seed: int, overrides: Sequence[str]) -> list[str]:
    """Return the command line of one federation.

    Args:
        method: key of `METHODS`.
        encoding: encoding of updates and download.
        seed: seed of the run.
        overrides: further Hydra overrides.
    """
    return [
        sys.executable,
        "-m",
        "simulations.run",
        *COMMON,
        *METHODS[method],
        *encoding.overrides,
        f"adapter.shared.lr={RATES[method]}",
        f"seed={seed}",
        *overrides,
    ]


def run(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a federation unless it is complete, and return its losses by arm `[writers]` and its bytes."""
    run_once(arguments, folder)
    rows = json.loads((folder / "evaluation.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "losses": {arm: [row[arm]["loss"] for row in rows] for arm in ("base", "shared")},
        "bytes_up": summary["bytes"]["up"],
        "bytes_down": summary["bytes"]["down"],
    }


def gain_kept(
    encoded_runs: Sequence[Mapping[str, Any]], fp32_runs: Sequence[Mapping[str, Any]]
) -> tuple[float, float, float]:
    """Compute the share of the fp32 gain over all seeds' writers, with its 95 % interval for a fixed gain at fp32."""
    gain, reference = (
        np.concatenate([np.subtract(run["losses"]["base"], run["losses"]["shared"]) for run in runs])
        for runs in (encoded_runs, fp32_runs)
    )
    difference, low, high = share(gain - reference, reference)  # paired: writers differ far more than precisions
    return 1 + difference, 1 + low, 1 + high


def gain_table(results: Mapping[tuple[str, UpdateEncoding], Sequence[Mapping[str, Any]]]) -> Table:
    """Return a table with a row for each method and encoding."""
    table = Table(title=f"share of the gain at fp32 that the shared adapter keeps [95 %]; target ≥ {MIN_GAIN_KEPT:.0%}")
    for heading in (
        "method",
        "encoding",
        "shared loss",
        "gain kept",
        "MB up, all rounds",
        "× fewer",
        "MB down",
        "× fewer",
    ):
        table.add_column(heading, justify="right")
    for (method, encoding), encoded_runs in results.items():
        fp32_runs = results[method, FP32]
        mean, low, high = gain_kept(encoded_runs, fp32_runs)
        up, all_up, down, all_down = (
            sum(run[key] for run in runs) for key in BYTES for runs in (encoded_runs, fp32_runs)
        )
        loss = np.mean([run["losses"]["shared"] for run in encoded_runs])
        of_gain = f"{loss:.4f}", f"{mean:.1%} [{low:.1%}, {high:.1%}]"
        of_bytes = f"{up / 1e6:.2f}", f"{all_up / up:.1f}", f"{down / 1e6:.2f}", f"{all_down / down:.1f}"
        table.add_row(method, encoding.name, *of_gain, *of_bytes)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15", help="base whose shapes are used")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--gain", action="store_true", help="also run the federations")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--precisions", nargs="*", choices=quantization.PRECISIONS, default=list(quantization.PRECISIONS)
    )
    parser.add_argument("--down", nargs="*", choices=quantization.PRECISIONS, default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/traffic"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/traffic.json"))
    arguments, overrides = parser.parse_known_args()
    known = find_base(arguments.base)
    sites = find_sites(known.network(), known.family.sites)
    counted = update_sizes(sites, arguments.rank)
    Console().print(size_table(arguments.base, arguments.rank, counted))
    down = downloads(sites, arguments.rank)
    sizes_down = ", ".join(f"{precision} {count / 1e6:.3f}" for precision, count in down.items())
    Console().print(f"MB of the adapter that is sent down: {sizes_down}")
    options = ["--base", arguments.base, "--rank", str(arguments.rank)]
    if arguments.gain:
        options += [
            "--gain",
            "--methods",
            *arguments.methods,
            "--precisions",
            *arguments.precisions,
            "--down",
            *arguments.down,
        ]
        options += ["--seeds", *map(str, arguments.seeds), *overrides]
    record: dict[str, Any] = {
        "command": " ".join(["python -m bench.quality.traffic", *options]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions("torch", "diffusers"),
        "wanted": {"bytes": MAX_BYTES, "kept": MIN_GAIN_KEPT},
        "bytes": {"base": arguments.base, "rank": arguments.rank, "sites": len(sites), **counted, "down": down},
    }
    results: dict[tuple[str, UpdateEncoding], list[dict[str, Any]]] = {}
    if arguments.gain:
        work = [
            (method, encoding, seed)
            for method in arguments.methods
            for encoding in encodings(method, arguments.precisions, arguments.down)
            for seed in arguments.seeds
        ]

        def run_one(method: str, encoding: UpdateEncoding, seed: int) -> dict[str, Any]:
            folder = arguments.runs / f"{method}-{encoding.precision}-{encoding.keep}-{encoding.down}-{seed}"
            return run(command(method, encoding, seed, overrides), folder)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for (method, encoding, _), result in zip(work, pool.map(lambda which: run_one(*which), work), strict=True):
                results.setdefault((method, encoding), []).append(result)
        record["gain"] = [
            {"method": method, "sent": encoding.name, "kept": gain_kept(result, results[method, FP32]), "runs": result}
            for (method, encoding), result in results.items()
        ]
        Console().print(gain_table(results))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
