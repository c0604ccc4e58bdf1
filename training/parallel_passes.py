"""Passes through the base, side by side on a CPU's cores.

The layers of a small UNet are too small to be shared between cores: threads spend their time waiting for each
other, and much more of it on a busy machine. So each core takes whole passes, with single-threaded layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

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


@contextmanager
def without_denormals(device: torch.device) -> Iterator[None]:
    """Within this context the calling thread of a CPU takes numbers near the smallest for zero.

    Arithmetic with them can take a hundred times as long, so that the time of a pass would tell of what it sees.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_flush_denormal(False)


class Stopwatch:
    """Seconds of what runs within it, each time; on a GPU it doesn't wait for that, and `seconds` does."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._taken: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._begun = self._now()

    def __exit__(self, *error: object) -> None:
        self._taken.append((self._begun, self._now()))

    def __len__(self) -> int:
        return len(self._taken)

    def seconds(self) -> list[float]:
        """Of each time, in order."""
        if not self._cuda:
            return [end - begin for begin, end in self._taken]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._taken]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


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
