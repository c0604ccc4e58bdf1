"""How many jobs and entries a memory budget holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from common.errors import AntherError
from common.units import GIB
from models.base.denoiser import Denoiser
from models.lora.batched_lora import BatchedAdapter
from training import memory
from training.buffers import BufferSpec, CohortBuffers, common_bytes, row_bytes
from training.jobs import TrainJob
from training.microbatching import Microbatch
from training.parallel_passes import single_threaded_layers, workers
from training.step import gradients, on_device, reduce

LARGEST = {"cpu": 64}  # entries of a pass beyond which a core gains nothing: `bench.throughput.cohort`


class InsufficientMemoryError(AntherError):
    """The memory that was granted doesn't hold one job and one entry."""


class Capacity(NamedTuple):
    """What is on the device at once."""

    jobs: int
    entries: int  # in all passes together
    room: int  # bytes for those passes
    expected: int  # entries of one step of so many jobs


def capacity(base: Denoiser, jobs: Sequence[TrainJob], limit: int) -> Capacity:
    """What fits in `limit` bytes, jobs and entries in the proportion in which they are needed.

    Raises:
        TooLittleMemoryError: not even one job and one entry fit.
    """
    shape = BufferSpec.of(jobs)
    row, entry, granted = row_bytes(base, shape), entry_bytes(base, shape), limit
    limit -= common_bytes(base, shape)
    if row + entry > limit:
        least = row + entry + granted - limit
        raise InsufficientMemoryError(
            f"trainer.memory_gib={granted / GIB:.3g}: one picture of one device takes {least / GIB:.3g} here: "
            "give more, or train fewer sites"
        )
    step = max(map(expected_entries, jobs))
    resident = max(1, min(len(jobs), int((limit - entry) // (row + step * entry))))  # always room for one entry
    expected = sum(sorted(map(expected_entries, jobs), reverse=True)[:resident])
    room = limit - resident * row
    return Capacity(resident, room // entry, room, max(1, int(expected)))


def expected_entries(job: TrainJob) -> float:
    """Entries of one step of a job; under DP the mean for as many pictures as the plan assumes, however many there are.

    So what fits, and whether anything does, tells nothing of the pictures.
    """
    if job.privacy:
        return job.unit * job.privacy.sampling_rate * job.assumed_pictures
    return (2 if job.prior else 1) * job.batch_size


def entry_bytes(base: Denoiser, shape: BufferSpec) -> int:
    """Bytes that one entry takes in a pass and after it, counted on a pass of one entry."""

    def prepare() -> Callable[[], object]:
        rows = CohortBuffers(base, shape, 1)
        zeros, ones = np.zeros(1, np.int64), np.ones(1)
        one = zeros + 1
        pack = Microbatch(zeros, zeros, ones / 2, zeros, ones, one, zeros, one, one, piece=False, last=True)
        return lambda: reduce(rows, pack, *gradients(base, rows, on_device(pack, base.device)))

    return _count(base, shape, prepare)


def max_pictures_per_pass(
    base: Denoiser, latents: torch.Size, context: torch.Size, adapters: Sequence[BatchedAdapter], limit: int
) -> int:
    """Pictures that one pass without gradients may hold, in `limit` bytes for all that run at once; at least 1.

    Each takes a copy of its adapters, of those that don't serve everybody.
    """
    own = [stack for stacks in adapters for stack in stacks.values() if len(stack.a) > 1]
    copies = sum(stack.a[0].nbytes + stack.b[0].nbytes for stack in own)

    @torch.no_grad()
    def work() -> object:
        with base.use_adapters([]) as denoise:
            x = torch.zeros(1, *latents, dtype=base.full_precision, device=base.device)
            return denoise(x, torch.zeros(1, dtype=torch.long, device=base.device), x.new_zeros(1, *context))

    return max_pass_size(base.device, limit // (_count(base, (latents, context), lambda: work) + copies))


def max_pass_size(device: torch.device, together: int) -> int:
    """Entries of one pass, of so many in all passes that run at once; at least 1."""
    return max(1, min(together // workers(device), LARGEST.get(device.type, together)))


def _count(base: Denoiser, key: object, prepare: Callable[[], Callable[[], object]]) -> int:
    """Bytes of the work that `prepare` makes ready, counted once for each key."""
    if key not in base.cache:
        work = prepare()
        with single_threaded_layers():
            base.cache[key] = int(memory.counted(work) * memory.WORKSPACE[base.device.type])
    count: int = base.cache[key]
    return count
