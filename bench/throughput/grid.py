"""Overhead of the simulation grid.

    anther bench grid [--clients 100] [--rounds 20] [key=value …]

Runs rounds on the glyph base without the training: each Train job returns its initial adapter. The remaining cost is
the overhead of a simulation: messages, checks, ledger charges, sealed replies. Every device takes part in every round.
Reported is the process's CPU time, median over rounds, without the first two, which cache pictures and compute ε for
the first time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from conf.compose import compose
from conf.schemas.simulation import SimulationConfig
from models.base.base import Base, load
from models.lora.adapter import init_adapter
from privacy.storage import FileStorage, Storage
from protocol import records
from simulations.fleet.participants import participants
from simulations.fleet.storage import FILE, Database
from simulations.grid.cohort import CohortGrid, commit_each_write
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from strategies.round.messages import to_messages
from strategies.round.request import RoundStart
from training.jobs import EncodeJob, Examples, Job, Result, TrainedAdapter, TrainJob

WARM_UP = 2  # warm-up rounds that are not counted
PRIVACY = ("none", "example")
LIMITS = {"none": 50.0, "example": 150.0}  # largest CPU milliseconds of a round of 100 clients


class Cost(NamedTuple):
    """Cost of one round in milliseconds."""

    cpu: float
    wall: float


def skip_training(base: Base, jobs: Sequence[Job]) -> list[Result | Exception]:
    """Return results of the correct shapes without training."""
    return [_empty_result(base, job) for job in jobs]


def _empty_result(base: Base, job: Job) -> Result:
    match job:
        case TrainJob():
            return TrainedAdapter(job.start, 0.1, job.steps)
        case EncodeJob():
            return Examples(torch.zeros(len(job.pictures), *base.shape), torch.zeros(len(job.pictures), 8, 64))
    raise TypeError(f"a training round has no job of type {type(job).__name__}")


def measure(config: SimulationConfig, base: Base, folder: Path, storage: str) -> list[Cost]:
    """Run the rounds, and return the cost of each counted one.

    Args:
        config: the simulation.
        base: its base.
        folder: the devices' storage.
        storage: type of the storage, `sqlite` or `files`.
    """
    database = Database(folder / FILE)
    of_device: Callable[[str], Storage] = database.device
    together: Callable[[], AbstractContextManager[Callable[[], None]]] = database.group_commit
    if storage == "files":
        of_device, together = (lambda name: FileStorage(folder / name)), commit_each_write
    people = participants(config, base, of_device)
    plan = training_plan(config, run="bench", base=base.hash)
    strategy = build(config, plan, base.sites, accept_simulated=True)
    grid = CohortGrid([person.device for person in people], partial(skip_training, base), group_commit=together)
    adapter = init_adapter(base.sites, config.adapter.shared.rank, seed=0)
    costs = []
    for number in range(1, config.rounds + 1):
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        request = strategy.training.request(RoundStart(number=number, adapter=adapter), grid)
        for reply in grid.send_and_receive(to_messages(request.messages)):
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            records.reply_from_records(reply.metadata.message_type, reply.content)
        costs.append(Cost(1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    database.close()
    return costs[WARM_UP:]


def table(results: Sequence[dict[str, Any]], clients: int) -> Table:
    """Return a table with a row for each storage and privacy."""
    shown = Table(title=f"one round of the grid, {clients} clients, median in ms")
    for heading in ("storage", "privacy", "CPU", "wall", "CPU per client", "at most"):
        shown.add_column(heading, justify="right")
    for row in results:
        cpu, wall = row["cpu_ms"]["median"], row["wall_ms"]["median"]
        most = f"{row['at_most_ms']:.0f}" if row["at_most_ms"] else ""
        shown.add_row(row["storage"], row["privacy"], f"{cpu:.0f}", f"{wall:.0f}", f"{cpu / clients:.2f}", most)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20, help=f"number of rounds, including {WARM_UP} for warm-up")
    parser.add_argument("--folder", type=Path, help="folder for the devices' storage (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/grid.json"))
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    fixed = [f"data.devices={arguments.clients}", f"rounds={arguments.rounds}", "base.device=cpu", "fleet=laptops"]
    writers = [f"data.writers={min(arguments.clients, 20)}"]
    results = []
    for storage in ("sqlite", "files"):
        for privacy in PRIVACY:
            config = compose(" ".join([*writers, *fixed, f"privacy={privacy}", *overrides]))
            base = load(config.base.path, sites=config.adapter.sites, device="cpu")
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                costs = measure(config, base, Path(folder), storage)
            row: dict[str, Any] = {"storage": storage, "privacy": privacy}
            for name in Cost._fields:
                values = [getattr(cost, name) for cost in costs]
                row[f"{name}_ms"] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
            row["at_most_ms"] = LIMITS[privacy] * arguments.clients / 100 if storage == "sqlite" else None
            results.append(row)
    numbers = config.adapter.shared.rank * sum(site.inputs + site.outputs for site in base.sites.values())
    record = {
        "command": " ".join(
            [
                "python -m bench.throughput.grid",
                f"--clients {arguments.clients}",
                f"--rounds {arguments.rounds}",
                *overrides,
            ]
        ),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "flwr", "safetensors"),
        "adapter": {"rank": config.adapter.shared.rank, "sites": len(base.sites), "numbers": numbers},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=120).print(table(results, arguments.clients))


if __name__ == "__main__":
    main()
