"""Passes as CUDA graphs, which the GPU runs without waiting for Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.diffusion.denoiser import Denoiser
from training.buffers import CohortBuffers
from training.step import Entries, gradients

_WARM_UP = 2  # passes before the capture; kernels are compiled and selected in the first one
_HALVES = 4  # number of smaller sizes


class GraphedPasses:
    """`training.step.gradients` for up to `size` entries, as CUDA graphs of that size and of halves of it.

    A pass uses the smallest graph that holds its entries, padded with entries of weight 0. Only the full size is
    compiled, if requested; the others are for the last entries of a call. All graphs are captured at creation, so that
    no round waits for one that it is the first to need.

    Args:
        base: the base.
        buffers: adapters and examples of the resident jobs.
        size: maximum number of entries.
        compiled: compile the graph of the full size.
        one_size: no halves. Kernels depend on the size, so private passes all have one.
    """

    def __init__(
        self, base: Denoiser, buffers: CohortBuffers, size: int, *, compiled: bool, one_size: bool = False
    ) -> None:
        pool = torch.cuda.graph_pool_handle()  # shared memory, since graphs never run concurrently
        halvings = 0 if one_size else _HALVES
        halves = [size >> halving for halving in range(1, halvings + 1) if size >> halving]
        self._graphs = {size: _Graph(base, buffers, size, pool, compiled=compiled)}
        self._graphs |= {half: _Graph(base, buffers, half, pool, compiled=False) for half in halves}

    def __call__(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return gradients and losses, which the next call overwrites."""
        count = len(entries.rows)
        grads, losses = self._graphs[min(size for size in self._graphs if size >= count)](entries)
        return grads[:count], losses[:count]


class _Graph:
    """Graph of one size."""

    def __init__(self, base: Denoiser, buffers: CohortBuffers, size: int, pool: Any, *, compiled: bool) -> None:
        numbers = torch.zeros(3, size, dtype=torch.long, device=base.device)
        self._entries = Entries(*numbers, *numbers[:2].double())
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(_WARM_UP):
                gradients(base, buffers, self._entries, compiled=compiled)
        torch.cuda.current_stream().wait_stream(side_stream)
        torch.cuda.empty_cache()  # the graph has its own memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = gradients(base, buffers, self._entries, compiled=compiled)

    def __call__(self, entries: Entries) -> tuple[Tensor, Tensor]:
        count = len(entries.rows)
        for static, value in zip(self._entries, entries, strict=True):
            static[:count] = value
        self._entries.weights[count:] = 0.0
        self._graph.replay()
        return self._outputs
