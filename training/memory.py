"""How much memory a cohort may use, and what that holds.

The budget is a share of the machine's total memory, so that the same machine packs alike at every start; what a pass
takes is counted on one pass of one entry, on tensors, so that it doesn't depend on what else runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import AntherError
from common.units import GIB
from models.footprint.tensor_memory import LiveStorages

SHARE = {"cpu": 0.25, "cuda": 0.6}  # of the total, where nobody says otherwise
WORKSPACE = {"cpu": 1.15, "cuda": 1.3}  # what kernels and allocators take beside the tensors that can be counted


def budget(memory_gib: float | None, device: torch.device) -> int:
    """Bytes for a cohort on `device`: as asked, or a fixed share of the total."""
    return int(memory_gib * GIB) if memory_gib else int(SHARE[device.type] * total_and_free(device)[0])


def check_free(wanted: int, device: torch.device, *, key: str = "trainer.memory_gib") -> None:
    """Raises AntherError, naming the `key` that asked for it, if less than `wanted` bytes are free on `device` now."""
    total, free = total_and_free(device)
    if wanted > free:
        raise AntherError(
            f"{key}={wanted / GIB:.3g}: only {free / GIB:.3g} of {total / GIB:.3g} GiB are free on this "
            f"{device.type}: stop what else runs there, or ask for less"
        )


def training_share(granted: int) -> int:
    """The part of what was granted that training takes, and keeps as buffers for the next time."""
    return granted * 3 // 4


def inference_share(granted: int) -> int:
    """The other part: for held-out losses and pictures, which may be asked for while training keeps its own."""
    return granted // 4


def counted(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at once in tensors that it made itself."""
    with LiveStorages() as found:
        work()
    return found.peak


def total_and_free(device: torch.device) -> tuple[int, int]:
    """Bytes of the machine's memory, or of the container's that we run in."""
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
    """A number that a container's memory controller tells (cgroup v2)."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text()
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None
