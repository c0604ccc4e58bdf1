"""Passes through the base, side by side on a CPU's cores.

The layers of a small UNet are too small to be shared between cores: threads spend their time waiting for each
other, and much more of it on a busy machine. So each core takes whole passes, with single-threaded layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

P = TypeVar("P")
R = TypeVar("R")


def workers(device: torch.device) -> int:
    """Passes that run at once: PyTorch's number of threads on a CPU, one elsewhere."""
    return _cores() if device.type == "cpu" else 1


def pass_size(device: torch.device, entries: int, most: int) -> int:
    """Entries of one pass: at most `most`, and no more than gives every core its share."""
    return max(1, min(most, -(-entries // workers(device))))


def run_passes(device: torch.device, function: Callable[[P], R], parts: Iterable[P]) -> Iterator[R]:
    """function(part) of every part, in order, so that sums over them don't depend on who was faster."""
    if workers(device) == 1:
        yield from map(function, parts)
        return
    with single_threaded_layers():
        yield from _pool().map(function, parts)


@cache
def _cores() -> int:
    return torch.get_num_threads()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="pass", initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def single_threaded_layers() -> Iterator[None]:
    """Within this context every layer runs on the caller's core alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
