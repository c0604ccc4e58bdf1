"""Pages of a mapped file: in memory while they are read, and given back at once."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_DONTNEED = 4
_MARKED = WeakTensorKeyDictionary()  # apart from the tensors: an attribute would be copied with them


def mark(tensor: Tensor) -> Tensor:
    """Remember of a tensor that it is mapped from a file and never written to. A copy of it isn't marked."""
    _MARKED[tensor] = True
    return tensor


def release(tensor: Tensor, start: int, stop: int) -> None:
    """Give back the pages of some entries of a tensor, if it is marked; they are read again when they are asked for.

    A neighbour in the file may lose a page as well. Other memory would be lost for good, so it must be marked.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    advise = _madvise()
    if advise is None or tensor not in _MARKED or start == stop:
        return
    size = tensor.element_size()
    first = (tensor.data_ptr() + start * size) & -mmap.PAGESIZE
    advise(first, tensor.data_ptr() + stop * size - first, _DONTNEED)


@cache
def _madvise() -> Any:
    """The C library's madvise where MADV_DONTNEED does that, on Linux; None elsewhere."""
    if not sys.platform.startswith(("linux", "android")):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
