"""How much memory a cohort may use, and what that holds.

The budget is a share of the machine's total memory, so that the same machine packs alike at every start; what a pass
takes is counted on one pass of one entry, on tensors, so that it doesn't depend on what else runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.errors import AntherError

SHARE = {"cpu": 0.25, "cuda": 0.6}  # of the total, where nobody says otherwise
WORKSPACE = {"cpu": 1.15, "cuda": 1.3}  # what kernels and allocators take beside the tensors that can be counted
_GIB = 2**30


def budget(memory_gib: float | None, device: torch.device) -> int:
    """Bytes for a cohort on `device`: as asked, or a fixed share of the total."""
    return int(memory_gib * _GIB) if memory_gib else int(SHARE[device.type] * _total_and_free(device)[0])


def check_free(wanted: int, device: torch.device) -> None:
    """Raises AntherError if less than `wanted` bytes are free on `device` now."""
    total, free = _total_and_free(device)
    if wanted > free:
        raise AntherError(
            f"cohort.memory_gib={wanted / _GIB:.3g}: only {free / _GIB:.3g} of {total / _GIB:.3g} GiB are free on this "
            f"{device.type}: stop what else runs there, or ask for less"
        )


def for_training(granted: int) -> int:
    """The part of what was granted that training takes, and keeps as buffers for the next time."""
    return granted * 3 // 4


def for_looking(granted: int) -> int:
    """The other part: for held-out losses and pictures, which may be asked for while training keeps its own."""
    return granted // 4


def counted(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at once in tensors that it made itself."""
    with _Counter() as counter:
        work()
    return counter.peak


class _Counter(TorchDispatchMode):
    """Adds up the storages that operations make, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}
        self._live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self._live -= size

        self._known[key] = weakref.ref(storage, gone)
        self._live += size
        self.peak = max(self.peak, self._live)


def _total_and_free(device: torch.device) -> tuple[int, int]:
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
