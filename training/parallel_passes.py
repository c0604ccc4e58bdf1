"""Parallel passes through the base on the cores of a CPU.

The layers of a small UNet are too small to be split between cores: threads spend most of their time waiting for each
other, even more so on a busy machine. Therefore each core runs whole passes with single-threaded layers.
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
    """Return the number of concurrent passes: PyTorch's number of threads on a CPU, otherwise one."""
    return _cores() if device.type == "cpu" else 1


def pass_size(device: torch.device, entries: int, limit: int) -> int:
    """Compute the number of entries of one pass: at most `limit`, and small enough to occupy every core.

    Args:
        device: the base's device.
        entries: entries of all passes.
        limit: maximum number of entries per pass.
    """
    return max(1, min(limit, -(-entries // workers(device))))


def run_passes(device: torch.device, function: Callable[[P], R], parts: Iterable[P]) -> Iterator[R]:
    """Apply `function` to every part, in order, so that sums over the results don't depend on timing.

    Args:
        device: the base's device.
        function: runs one pass.
        parts: arguments of the passes.

    Returns:
        Results in the order of `parts`.
    """
    if workers(device) == 1:
        yield from map(function, parts)
        return
    with single_threaded_layers():
        yield from _pool().map(function, parts)


@contextmanager
def without_denormals(device: torch.device) -> Iterator[None]:
    """Flush denormal numbers to zero in the calling CPU thread, within this context.

    Arithmetic with denormals can take a hundred times as long, so that the duration of a pass would reveal its data.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_flush_denormal(False)


class Stopwatch:
    """Context manager that measures the durations of code blocks. On a GPU, only `seconds` synchronizes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._started, self._now()))

    def __len__(self) -> int:
        return len(self._spans)

    def seconds(self) -> list[float]:
        """Durations in order."""
        if not self._cuda:
            return [end - begin for begin, end in self._spans]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._spans]

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
    """Run every layer on the caller's core only, within this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
