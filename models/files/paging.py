"""Release pages of a memory-mapped file as soon as they have been read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_DONTNEED = 4
_AROUND = 1 << 21  # bytes on either side that the kernel may read with a page: 64 KiB, or a whole huge page
_MARKED = WeakTensorKeyDictionary()  # address range of the mapping; not a tensor attribute, which copies would keep


def mark_mapped(tensors: Iterable[Tensor]) -> None:
    """Record which tensors, of any shape, are mapped from files.

    They must never be written to; copies aren't marked.
    """
    mappings = _mappings()
    for tensor in tensors:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        mapping = next((each for each in mappings if each.start <= start and stop <= each.stop), None)
        if mapping is not None:
            _MARKED[tensor] = mapping


def release_pages(tensor: Tensor, start: int, stop: int) -> None:
    """Release the pages of elements `start` to `stop` of a marked tensor; they are read again on the next access.

    Neighboring tensors in the file lose the pages that were read with this one. The range is limited to the file's
    mapping: outside of it, memory contents would be lost.

    Args:
        tensor: contiguous, of any shape, on the CPU; ignored unless it is marked.
        start: flat index of the first element.
        stop: flat index after the last element.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    advise = _madvise()
    if advise is None or tensor not in _MARKED or start == stop:
        return
    mapping, size = _MARKED[tensor], tensor.element_size()
    first = max(mapping.start, (tensor.data_ptr() + start * size - _AROUND) & -mmap.PAGESIZE)
    last = min(mapping.stop, tensor.data_ptr() + stop * size + _AROUND)
    advise(first, last - first, _DONTNEED)


def _mappings() -> list[range]:
    """Return this process's address ranges that are mapped from files; none without /proc."""
    maps = Path("/proc/self/maps")
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()] if maps.exists() else []
    spans = [line[0].split("-") for line in lines if line[4] != "0"]  # the file's inode
    return [range(int(start, 16), int(stop, 16)) for start, stop in spans]


@cache
def _madvise() -> Any:
    """Return the C library's madvise on Linux, where MADV_DONTNEED drops pages; None elsewhere."""
    if not sys.platform.startswith(("linux", "android")):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
