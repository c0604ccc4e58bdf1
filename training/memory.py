"""Memory budget of a cohort, and measurement of the memory of a pass.

By default, the budget is a fraction of the machine's total memory, so that batches have the same sizes at every start.
The memory of a pass is measured on the tensors of a pass of one entry, so that it doesn't depend on other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import AntherError
from common.units import GIB
from models.footprint.tensor_memory import LiveStorages

DEFAULT_SHARE = {"cpu": 0.25, "cuda": 0.6}  # default fraction of the total
WORKSPACE = {"cpu": 1.15, "cuda": 1.3}  # factor for kernels and allocators, on top of the counted tensors


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
