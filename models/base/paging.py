"""Pages of a mapped file: in memory while they are read, and given back at once."""

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
_AROUND = 1 << 21  # bytes on either side that may come in with a page that is read: 64 KiB, or a whole huge page
_MARKED = WeakTensorKeyDictionary()  # the file's range of addresses, apart from the tensors: copies don't have it


def mark_mapped(tensors: Iterable[Tensor]) -> None:
    """Remember which of some tensors are mapped from files. They must never be written to; copies aren't marked."""
    mappings = _mappings()
    for tensor in tensors:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        mapping = next((each for each in mappings if each.start <= start and stop <= each.stop), None)
        if mapping is not None:
            _MARKED[tensor] = mapping


def release_pages(tensor: Tensor, start: int, stop: int) -> None:
    """Give back the pages of some entries of a tensor, if it is marked; they are read again when they are asked for.

    Neighbours in the file lose the pages that came with them. Beyond the file's mapping memory would be lost for good.
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
    """The addresses of this process that are mapped from files; none where there is no /proc."""
    maps = Path("/proc/self/maps")
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()] if maps.exists() else []
    spans = [line[0].split("-") for line in lines if line[4] != "0"]  # the file's inode
    return [range(int(start, 16), int(stop, 16)) for start, stop in spans]


@cache
def _madvise() -> Any:
    """The C library's madvise where MADV_DONTNEED does that, on Linux; None elsewhere."""
    if not sys.platform.startswith(("linux", "android")):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
