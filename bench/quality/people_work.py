"""Work of `anther bench people` in worker processes, each with its results in a folder of its own.

A worker keeps its libraries and the GPU between its tasks. A finished task is not done again.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.lib.machine import machine
from bench.quality.people_local import LocalTask, train_people
from bench.quality.people_plan import FederationRun
from common import atomic_files
from common.seeding import derive_seed
from common.units import GIB

SHARE = 0.7  # fraction of the GPU's memory for all workers
CONTEXT_GIB = 0.7  # GPU memory of a process without any tensor


@contextmanager
def open_workers(folder: Path, jobs: int) -> Iterator[Workers]:
    """Start processes for tasks with results in a folder; those that wait are canceled if one fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(threads,))
    try:
        yield Workers(folder, jobs, pool)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Workers:
    """Processes that share one GPU, or the cores."""

    folder: Path
    jobs: int
    pool: Executor

    def federation(self, run: FederationRun) -> Future[dict[str, Any]]:
        """Run a federation; the result has its summary and the losses of the evaluated people."""
        return self.pool.submit(run_federation, self.with_memory(run.overrides), self.federation_folder(run))

    def local(self, name: str, task: LocalTask) -> Future[list[dict[str, Any]]]:
        """Train people without others; the result has a record for each setting."""
        words = self.with_memory(task.overrides)
        return self.pool.submit(run_local, replace(task, overrides=words), self.local_folder(name, task))

    def federation_folder(self, run: FederationRun) -> Path:
        """Return the folder of a run, whose name depends on its overrides."""
        return self.folder / f"{run.name}-{derive_seed(*run.overrides):016x}"

    def local_folder(self, name: str, task: LocalTask) -> Path:
        """Return the folder of a task, whose name depends on its settings."""
        return self.folder / f"{name}-{derive_seed(repr(task)):016x}"

    def call(self, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Call a function of a module in a worker."""
        return self.pool.submit(work, *arguments)

    def with_memory(self, overrides: Sequence[str]) -> tuple[str, ...]:
        """Add this process's memory on the GPU, if there is one, to overrides."""
        gib = memory_gib(self.jobs)
        return (*overrides, *([f"trainer.memory_gib={gib:.2f}"] if gib else []))


def memory_gib(jobs: int) -> float | None:
    """Return the GPU memory of one of several processes in GiB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    return max(0.5, SHARE * total / jobs - CONTEXT_GIB)


def run_federation(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a federation unless it is complete; an interrupted one is resumed.

    Exported adapters and checkpoints are deleted: the devices' stores hold the personal adapters.

    Args:
        overrides: its overrides.
        folder: its folder.
    """
    from simulations.run import simulate

    if not (folder / "summary.json").exists():
        free_memory()
        resume = ["resume=true"] if (folder / "run.json").exists() else []
        simulate([*overrides, *resume], folder)
        for part in ("adapters", "checkpoints"):
            shutil.rmtree(folder / part, ignore_errors=True)
    summary = json.loads((folder / "summary.json").read_text())
    rows = json.loads((folder / "evaluation.json").read_text())
    return {"summary": summary, "people": {row["name"]: _losses(row) for row in rows}}


def _losses(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses by arm; one that is not finite was stored as null."""
    by_arm = {arm: scores["loss"] for arm, scores in row.items() if isinstance(scores, dict)}
    losses = {arm: math.inf if loss is None else loss for arm, loss in by_arm.items()}
    return {"newcomer": row.get("newcomer", False), **losses}


def run_local(task: LocalTask, folder: Path) -> list[dict[str, Any]]:
    """Train people without others unless that is done; the adapters are stored too.

    Args:
        task: people and settings.
        folder: folder of the results.
    """
    file = folder / "results.json"
    if not file.exists():
        from models.lora.adapter import to_tensors

        free_memory()
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for number, (result, adapters) in enumerate(train_people(task)):
            if not task.grid:
                tensors = {name: to_tensors(adapter) for name, adapter in adapters.items()}
                torch.save(tensors, folder / f"adapters-{number}.pt")
            records.append(result._asdict())
        atomic_files.write(file, json.dumps(records).encode())
    return json.loads(file.read_text())


def free_memory() -> None:
    """Return the memory of earlier tasks to the GPU, where it counts as taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_machine() -> dict[str, object]:
    """Return the machine's properties."""
    return machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
