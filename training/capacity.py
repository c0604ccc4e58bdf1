"""Memory budget of a cohort, and the numbers of jobs and entries that fit in it.

By default, the budget is a fraction of the machine's total memory, so that batches have the same sizes at every start.
The memory of a pass is measured on the tensors of a pass of one entry, so that it doesn't depend on other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import AntherError
from common.units import GIB
from models.diffusion.denoiser import Denoiser
from models.footprint.tensor_memory import LiveStorages
from models.lora.batched_lora import BatchedAdapter
from training.batches import Microbatch
from training.buffers import BufferSpec, CohortBuffers, row_bytes, shared_bytes
from training.jobs import TrainJob
from training.passes import gradients, on_device, reduce, single_threaded_layers, workers
from training.public_schedule import fixed_pass_size

DEFAULT_SHARE = {"cpu": 0.25, "cuda": 0.6}  # default fraction of the total
WORKSPACE = {"cpu": 1.15, "cuda": 1.3}  # factor for kernels and allocators, on top of the counted tensors
MAX_ENTRIES = {"cpu": 64}  # more entries per pass don't speed up a core: `bench.throughput.cohort`


def budget(memory_gib: float | None, device: torch.device) -> int:
    """Compute the bytes for a cohort on `device`: the configured ones, or a fixed fraction of the total."""
    return int(memory_gib * GIB) if memory_gib else int(DEFAULT_SHARE[device.type] * total_and_free(device)[0])


def check_free(required: int, device: torch.device, *, key: str = "trainer.memory_gib") -> None:
    """Raise AntherError unless `required` bytes are free on `device` now.

    Args:
        required: bytes.
        device: the base's device.
        key: configuration key that set `required`, for the message.
    """
    total, free = total_and_free(device)
    if required > free:
        raise AntherError(
            f"{key}={required / GIB:.3g}: only {free / GIB:.3g} of {total / GIB:.3g} GiB are free on this "
            f"{device.type}: stop other programs there, or set a lower value"
        )


def training_share(memory: int) -> int:
    """Return the part of a memory budget in bytes for training, which keeps them as buffers for the next call."""
    return memory * 3 // 4


def inference_share(memory: int) -> int:
    """Return the part of a memory budget in bytes for held-out losses and image generation, while training keeps its
    buffers."""
    return memory // 4


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak bytes of the tensors that `work` allocates."""
    with LiveStorages() as storages:
        work()
    return storages.peak


def total_and_free(device: torch.device) -> tuple[int, int]:
    """Return the total and free bytes of the machine's memory, or of the container that this process runs in."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    memory = psutil.virtual_memory()
    limit = _cgroup("memory.max")
    if limit is None or limit >= memory.total:
        return memory.total, memory.available
    return limit, min(memory.available, limit - (_cgroup("memory.current") or 0))


def _cgroup(name: str) -> int | None:
    """Read a number of the container's memory controller (cgroup v2)."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text()
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None


class InsufficientMemoryError(AntherError):
    """Raised if the memory budget is too small for one job and one entry."""


class Capacity(NamedTuple):
    """Numbers of jobs and entries that fit on the device at the same time."""

    jobs: int
    entries: int  # in all concurrent passes
    pass_bytes: int  # memory of those passes
    expected: int  # expected entries of one step of these jobs


class PassPlan(NamedTuple):
    """How the jobs of a cohort share the device."""

    jobs: int  # that are trained at the same time
    parallel: int  # concurrent passes
    size: int  # entries per pass, at most; exactly, if the jobs are private
    inference_bytes: int  # for evaluations between passes


def plan_passes(base: Denoiser, jobs: Sequence[TrainJob], limit: int) -> PassPlan:
    """Plan the passes of jobs of one group in `limit` bytes.

    For private jobs, the plan is a function of public numbers (`training.public_schedule`).

    Args:
        base: the base.
        jobs: jobs of one group, which are all private or all not.
        limit: bytes.

    Raises:
        InsufficientMemoryError: one job and one entry don't fit.
    """
    fit, device, private = capacity(base, jobs, limit), base.device, jobs[0].privacy is not None
    size, inference_bytes = max_pass_size(device, fit.entries), fit.pass_bytes
    if device.type == "cuda":  # graphs keep their memory; their size holds a step of all jobs
        limit, inference_bytes = max(1, training_share(size)), inference_share(fit.pass_bytes)
        size = -(-fit.expected // -(-fit.expected // limit)) if not private else limit
    if private:
        size = fixed_pass_size(device, jobs[: fit.jobs], size, entry_bytes(base, BufferSpec.of(jobs)))
    return PassPlan(fit.jobs, min(workers(device), fit.entries), size, inference_bytes)


def capacity(base: Denoiser, jobs: Sequence[TrainJob], limit: int) -> Capacity:
    """Compute how many jobs and entries fit in `limit` bytes, in the proportion in which they are needed.

    Args:
        base: the base.
        jobs: jobs of one group.
        limit: bytes.

    Raises:
        InsufficientMemoryError: one job and one entry don't fit.
    """
    spec = BufferSpec.of(jobs)
    row_size, entry_size, budget = row_bytes(base, spec), entry_bytes(base, spec), limit
    limit -= shared_bytes(base, spec)
    if row_size + entry_size > limit:
        required = row_size + entry_size + budget - limit
        raise InsufficientMemoryError(
            f"trainer.memory_gib={budget / GIB:.3g}: one picture of one device requires {required / GIB:.3g} GiB here: "
            "set a larger value, or train fewer sites"
        )
    step_entries = max(map(expected_entries, jobs))
    resident_jobs = max(
        1, min(len(jobs), int((limit - entry_size) // (row_size + step_entries * entry_size)))
    )  # always room for one entry
    expected = sum(sorted(map(expected_entries, jobs), reverse=True)[:resident_jobs])
    pass_bytes = limit - resident_jobs * row_size
    return Capacity(resident_jobs, pass_bytes // entry_size, pass_bytes, max(1, int(expected)))


def expected_entries(job: TrainJob) -> float:
    """Compute the expected number of entries per step.

    Under DP it is the mean for the number of pictures that the plan assumes. So neither the number of jobs that fit,
    nor whether any does, reveals anything about the pictures.
    """
    if job.privacy:
        return job.unit * job.privacy.sampling_rate * job.assumed_pictures
    return (2 if job.prior else 1) * job.batch_size


def entry_bytes(base: Denoiser, spec: BufferSpec) -> int:
    """Return the bytes that one entry takes during and after a pass, measured on a pass of one entry."""

    def prepare() -> Callable[[], object]:
        buffers = CohortBuffers(base, spec, 1)
        zeros, ones = np.zeros(1, np.int64), np.ones(1)
        count = zeros + 1
        microbatch = Microbatch(zeros, zeros, ones / 2, zeros, ones, count, zeros, count, count, piece=False, last=True)
        return lambda: reduce(buffers, microbatch, *gradients(base, buffers, on_device(microbatch, base.device)))

    return _counted_bytes(base, spec, prepare)


def max_pictures_per_pass(
    base: Denoiser, latents: torch.Size, context: torch.Size, adapters: Sequence[BatchedAdapter], limit: int
) -> int:
    """Compute the maximum number of pictures in one pass without gradients; at least 1.

    Each picture takes a copy of those adapters that are not shared by all slots.

    Args:
        base: the base.
        latents: shape of one picture's latents [c, h, w].
        context: shape of one caption's embedding [tokens, d].
        adapters: batched adapters that are applied.
        limit: bytes for all concurrent passes.
    """
    per_slot = [stack for stacks in adapters for stack in stacks.values() if len(stack.a) > 1]
    copies = sum(stack.a[0].nbytes + stack.b[0].nbytes for stack in per_slot)

    @torch.no_grad()
    def run() -> object:
        with base.use_adapters([]) as denoise:
            x = torch.zeros(1, *latents, dtype=base.full_precision, device=base.device)
            return denoise(x, torch.zeros(1, dtype=torch.long, device=base.device), x.new_zeros(1, *context))

    return max_pass_size(base.device, limit // (_counted_bytes(base, (latents, context), lambda: run) + copies))


def max_pass_size(device: torch.device, total: int) -> int:
    """Compute the number of entries of one pass from the total of all concurrent passes; at least 1."""
    return max(1, min(total // workers(device), MAX_ENTRIES.get(device.type, total)))


def _counted_bytes(base: Denoiser, key: object, prepare: Callable[[], Callable[[], object]]) -> int:
    """Return the peak bytes of the function that `prepare` returns, measured once for each key."""
    if key not in base.cache:
        run = prepare()
        with single_threaded_layers():
            base.cache[key] = int(peak_bytes(run) * WORKSPACE[base.device.type])
    count: int = base.cache[key]
    return count
