"""Cost of privacy per step.

    anther bench private_cost [--device cpu|cuda] [--steps 20] [--repeats 3] [--small]

Trains one client's adapter on the glyph base, non-private (open) and private in turn, on batches of the same mean size,
and compares:

    computed  ratio of the work of the private job to the open job's: clipping, noise, and padded passes
    waited    ratio of the time until the reply is sent: the private job's public schedule to the open job

The second ratio can be predicted: `formula` is K · pass / (steps · open step) for K turns (`training.public_schedule`).
The fixed cost of a pass, besides its entries, is fitted to passes of several sizes and gives
`training.public_schedule.PASS_OVERHEAD_BYTES`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.throughput.roofline import synchronize
from models.base.base import Base, load
from models.lora.adapter import init_adapter
from privacy.noise import SimulatedNoise
from training.batches import Microbatch
from training.buffers import BufferSpec, CohortBuffers
from training.capacity import budget, capacity, entry_bytes, max_pass_size, plan_passes, training_share
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainedAdapter, TrainJob
from training.passes import gradients, on_device, single_threaded_layers
from training.public_schedule import PASS_OVERHEAD_BYTES, TurnCount, scheduled_turns
from typefaces import dataset

RANK, MAX_RATIO = 8, 1.15
CASES = [  # mean pictures per batch, draws per picture, assumed number of pictures
    (4, 1, 20),
    (4, 4, 20),
    (5, 8, 5),
    (8, 4, 40),
    (16, 1, 200),
    (16, 4, 200),
    (20, 4, 20),
    (64, 1, 1000),
]
SMALL = CASES[:2] + CASES[6:7]
SIZES = (1, 2, 4, 8, 16, 32)


def letter_examples(base: Base, count: int) -> Examples:
    """Create `count` examples by repeating a few letters."""
    writer = dataset.load("development")[0]
    order = writer.order[:20]
    latents = base.encode_images([writer.images[glyph] for glyph in order]).cpu()
    context = base.encode_captions([dataset.caption(dataset.GLYPHS[glyph]) for glyph in order]).cpu()
    index = torch.arange(count) % len(order)
    return Examples(latents[index], context[index])


def make_job(
    base: Base, examples: Examples, case: tuple[int, int, int], steps: int, seed: int, *, private: bool
) -> TrainJob:
    """Create the job of a case; an open job has the same number of entries per step.

    Args:
        base: the base.
        examples: at least as many examples as the case assumes.
        case: an entry of `CASES`.
        steps: number of steps.
        seed: round of the job and seed of its noise.
        private: whether the job is private.
    """
    batch, draws, assumed = case
    plain = TrainJob(
        client="bench",
        round=seed,
        purpose="shared",
        seed=7,
        examples=Examples(*(e[:assumed] for e in examples)),
        start=init_adapter(base.sites, RANK, 7),
        steps=steps,
        batch_size=batch * draws,
        learning_rate=1e-3,
    )
    if not private:
        return plain
    return dataclasses.replace(
        plain,
        batch_size=batch,
        names=tuple(map(str, range(assumed))),
        privacy=DPSGD(noise_multiplier=1.0, clip=0.01, sampling_rate=batch / assumed, draws=draws),
        noise=SimulatedNoise(seed=seed, client="bench", round=seed, purpose="shared"),
    )


def time_work(base: Base, work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Run `work`, and return its wall-clock seconds, its CPU seconds and its result."""
    synchronize(base.device)
    wall, busy = time.perf_counter(), time.process_time()
    result = work()
    synchronize(base.device)
    return time.perf_counter() - wall, time.process_time() - busy, result


def fit_overhead(base: Base, examples: Examples, repeats: int) -> dict[str, float]:
    """Fit the fixed seconds of a pass and the seconds per entry to the fastest passes of several sizes.

    Args:
        base: the base.
        examples: at least as many examples as the first case assumes.
        repeats: runs of each size; the fastest counts.
    """
    plan = make_job(base, examples, CASES[0], 1, 0, private=True)
    rows_shape = BufferSpec.of([plan])
    rows = CohortBuffers(base, rows_shape, 1)
    rows.load({0: plan})
    best = []
    with single_threaded_layers():  # as in parallel passes
        for size in SIZES:
            entries = on_device(Microbatch.zero_weight(0, 0, size, 1), base.device)
            passed = partial(gradients, base, rows, entries)
            best.append(min(time_work(base, passed)[base.device.type == "cpu"] for _ in range(repeats + 1)))
    per_entry, fixed = np.polyfit(SIZES, best, 1, w=1 / np.array(best))
    return {
        "pass": float(fixed),
        "entry": float(per_entry),
        "beside_bytes": float(fixed / per_entry) * entry_bytes(base, rows_shape),
    }


def measure(base: Base, examples: Examples, case: tuple[int, int, int], steps: int, repeats: int) -> dict[str, Any]:
    """Measure seconds per step, open and private, and their ratios: medians over alternating repeats.

    Args:
        base: the base.
        examples: at least as many examples as the case assumes.
        case: an entry of `CASES`.
        steps: steps per job.
        repeats: jobs of each kind.
    """
    memory = training_share(budget(None, base.device))
    timings: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for seed in range(repeats):
        for private in (False, True):
            for warm in (False, True):  # the first job replaces the other kind's buffers and, on a GPU, its graphs
                plan = make_job(base, examples, case, steps, seed, private=private)
                wall, busy, (trained,) = time_work(base, partial(train, base, [plan], memory=memory, timesteps=1))
                assert isinstance(trained, TrainedAdapter), trained
                if warm:
                    timings[private].append((wall / steps, busy / steps, (wall + trained.idle) / steps))
    (open_wall, open_busy, _), (wall, busy, lasts) = (
        [statistics.median(values) for values in zip(*timings[private], strict=True)] for private in (False, True)
    )
    batch, draws, assumed = case
    plan = make_job(base, examples, case, steps, 0, private=True)
    max_entries = max_pass_size(base.device, capacity(base, [plan], memory).entries)
    passes = plan_passes(base, [plan], memory)
    size, turns = passes.size, TurnCount.of(plan, passes.size, passes.parallel)
    beside, planned = (
        PASS_OVERHEAD_BYTES[base.device.type] / entry_bytes(base, BufferSpec.of([plan])),
        scheduled_turns(assumed, batch / assumed, steps, turns),
    )
    open_passes = -(-batch * draws // max_entries)  # passes of the open step
    expected = planned * turns.at_once * (beside + size) / (steps * (open_passes * beside + batch * draws))
    return {
        "batch": batch,
        "draws": draws,
        "pictures": assumed,
        "size": size,
        "turns": planned,
        "open_ms": 1e3 * open_wall,
        "private_ms": 1e3 * wall,
        "lasts_ms": 1e3 * lasts,
        "computed": busy / open_busy if base.device.type == "cpu" else wall / open_wall,
        "waited": lasts / open_wall,
        "formula": expected,
    }


def table(record: dict[str, Any]) -> Table:
    """Return a table with a row for each case."""
    result = Table(title=f"Private over open step, {record['steps']} steps per job, {record['device']}")
    for name in ("batch", "draws", "of", "pass", "turns", "open ms", "private ms", "computed", "waited", "formula"):
        result.add_column(name, justify="right")
    for row in record["cases"]:
        numbers = [row[name] for name in ("batch", "draws", "pictures", "size", "turns")]
        times = [f"{row[name]:.1f}" for name in ("open_ms", "private_ms")]
        ratios = [f"{row[name]:.2f}" for name in ("computed", "waited", "formula")]
        result.add_row(*map(str, numbers), *times, *ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="three cases")
    parser.add_argument("--out", type=Path, default=Path("bench/results/private-cost.json"))
    args = parser.parse_args()
    base = load("glyphs", device=args.device)
    cases = SMALL if args.small else CASES
    examples = letter_examples(base, max(assumed for _, _, assumed in cases))
    record: dict[str, Any] = {
        "machine": machine(base.device),
        "versions": versions("torch"),
        "device": args.device,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "cases": [],
        # On a GPU these passes are CUDA graphs, which take the same time for one entry as for many.
        "a_pass": fit_overhead(base, examples, args.repeats) if base.device.type == "cpu" else None,
    }
    for case in cases:
        record["cases"].append(measure(base, examples, case, args.steps, args.repeats))
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console(width=120)
    console.print(table(record))
    if record["a_pass"]:
        console.print(f"a pass costs as much as {record['a_pass']['beside_bytes'] / 1e6:.0f} MB of additional entries")
    over = [row for row in record["cases"] if row["computed"] > MAX_RATIO]
    console.print(f"computed over {MAX_RATIO}: {len(over)} of {len(cases)} cases")


if __name__ == "__main__":
    main()
