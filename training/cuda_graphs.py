"""Passes as CUDA graphs, which the GPU runs without waiting for Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.base.denoiser import Denoiser
from training.buffers import CohortBuffers
from training.step import Entries, gradients

_WARM_UP = 2  # passes before the record: kernels are compiled and chosen in the first one
_HALVES = 4  # sizes beside the full one


class GraphedPasses:
    """`training.step.gradients` for up to `size` entries, in graphs of that size and of halves of it.

    A pass takes the smallest graph that holds its entries; the rest is filled up with entries of weight 0. Only the
    full size is compiled, if asked for: the others are for the last entries of a call. All are recorded here, so that
    no round waits for one that it is the first to need.

    Args:
        one_size: no halves. Kernels differ with the size, so private passes all take one.
    """

    def __init__(
        self, base: Denoiser, rows: CohortBuffers, size: int, *, compiled: bool, one_size: bool = False
    ) -> None:
        pool = torch.cuda.graph_pool_handle()  # of memory: no two graphs ever run at once
        halvings = 0 if one_size else _HALVES
        halves = [size >> halving for halving in range(1, halvings + 1) if size >> halving]
        self._graphs = {size: _Graph(base, rows, size, pool, compiled=compiled)}
        self._graphs |= {half: _Graph(base, rows, half, pool, compiled=False) for half in halves}

    def __call__(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Gradients and losses, overwritten by the next call."""
        count = len(entries.rows)
        found, losses = self._graphs[min(size for size in self._graphs if size >= count)](entries)
        return found[:count], losses[:count]


class _Graph:
    """One pass of one size."""

    def __init__(self, base: Denoiser, rows: CohortBuffers, size: int, pool: Any, *, compiled: bool) -> None:
        numbers = torch.zeros(3, size, dtype=torch.long, device=base.device)
        self._entries = Entries(*numbers, *numbers[:2].double())
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                gradients(base, rows, self._entries, compiled=compiled)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()  # the record keeps memory of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._found = gradients(base, rows, self._entries, compiled=compiled)

    def __call__(self, entries: Entries) -> tuple[Tensor, Tensor]:
        count = len(entries.rows)
        for fixed, given in zip(self._entries, entries, strict=True):
            fixed[:count] = given
        self._entries.weights[count:] = 0.0
        self._graph.replay()
        return self._found
