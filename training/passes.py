"""Passes through the base: the gradient of every entry, clipped by unit, and summed by client.

A pass runs as a CUDA graph, which the GPU runs without waiting for Python, or several run in parallel on the cores of a
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from common import counter_rng
from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import add_noise, per_example_loss, target
from privacy.dp_sgd import ClippedGradients, sum_segments
from training.batches import Microbatch
from training.buffers import BufferSpec, CohortBuffers

P = TypeVar("P")
R = TypeVar("R")

_BUFFERS = "buffers of the last cohort"
_WARM_UP = 2  # passes before the capture; kernels are compiled and selected in the first one
_HALVES = 4  # number of smaller sizes


class Entries(NamedTuple):
    """Entries [n] of a pass, on the device."""

    rows: Tensor
    examples: Tensor
    noise_keys: Tensor
    phases: Tensor
    weights: Tensor


class PassResult(NamedTuple):
    """Result of a pass for its c clients. A piece of a unit can't be clipped before the unit is complete."""

    clients: Tensor  # [c]
    losses: Tensor  # [c], summed over entries
    clipped: ClippedGradients | None
    piece: Tensor | None  # [1, D]


def on_device(microbatch: Microbatch, device: torch.device) -> Entries:
    """Copy a microbatch's entries to the device, in two transfers."""
    numbers = torch.from_numpy(np.stack([microbatch.rows, microbatch.examples, microbatch.noise_keys]))
    shares = torch.from_numpy(np.stack([microbatch.phases, microbatch.weights]))
    return Entries(*numbers.to(device), *shares.to(device))


def gradients(
    base: Denoiser, buffers: CohortBuffers, entries: Entries, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the weighted gradient and the loss of each entry.

    Each site's factors are separate leaves. As slices of one leaf, their gradients would each be padded to all of D.

    Args:
        base: the base.
        buffers: adapters and examples of the resident jobs.
        entries: entries [n] of the pass.
        compiled: use the compiled network (CUDA only).

    Returns:
        Gradients [n, D] and losses [n].
    """
    schedule, layout = base.schedule, buffers.layout
    x0, context = buffers.latents[entries.examples], buffers.context[entries.examples]
    noise = counter_rng.normals(entries.noise_keys, x0[0].numel()).to(x0).view_as(x0)
    t = (entries.phases * len(schedule)).long()
    copies = buffers.adapters[entries.rows].to(base.dtype)
    parts = [part.detach().requires_grad_() for part in copies.split(layout.widths, dim=1)]
    with base.use_adapters([buffers.frozen(entries.rows), layout.from_parts(parts)], compiled=compiled) as denoise:
        output = denoise(add_noise(schedule, x0, noise, t), schedule.times[t], context)
        weights = None if buffers.loss_weights is None else buffers.loss_weights[entries.examples]
        losses = per_example_loss(output, target(schedule, x0, noise, t), weights)
        if not layout.size:  # rank 0: nothing to train
            return copies.to(x0), losses.detach()
        grads = torch.autograd.grad((losses * entries.weights).sum(), parts)
    return torch.cat([part.to(x0) for part in grads], dim=1), losses.detach()


def reduce(buffers: CohortBuffers, microbatch: Microbatch, grads: Tensor, losses: Tensor) -> PassResult:
    """Sum gradients and losses by client, and clip the gradients if units are complete.

    Padding entries have gradients of zero, and their losses are excluded.

    Args:
        buffers: sums and bounds of the clients.
        microbatch: the pass.
        grads: gradients [n, D]. Overwritten.
        losses: losses [n].
    """
    counts = (microbatch.clients, microbatch.units, microbatch.entries, microbatch.unit_sizes)
    clients, units, entries, sizes = (torch.from_numpy(values).to(grads.device) for values in counts)
    per_client = sum_segments(losses[: int(microbatch.entries.sum())].double(), entries)
    if len(sizes) < microbatch.size:
        grads = sum_segments(grads, sizes)
    if microbatch.piece:
        return PassResult(clients, per_client, None, grads)
    return PassResult(clients, per_client, buffers.sums.clip(clients, grads, units), None)


def clip_unit(buffers: CohortBuffers, client: Tensor, unit: Tensor) -> ClippedGradients:
    """Clip a unit's gradient that was summed from its pieces.

    Args:
        buffers: bounds of the clients.
        client: row of the client, int64 [1].
        unit: summed gradient [1, D].
    """
    return buffers.sums.clip(client, unit, torch.ones_like(client))


class GraphedPasses:
    """`gradients` for up to `size` entries, as CUDA graphs of that size and of halves of it.

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


class BuffersKey(NamedTuple):
    """Settings that buffers and graphs depend on; a later call with an equal key can reuse them."""

    spec: BufferSpec
    capacity: int
    pass_size: int
    compiled: bool
    private: bool


def take_buffers(base: Denoiser, key: BuffersKey) -> tuple[CohortBuffers, GraphedPasses | None]:
    """Return buffers and, on a GPU, graphed passes over them.

    Those that were kept by the last call are reused if they fit, since consecutive rounds have similar jobs.
    """
    kept_key, buffers = base.cache.pop(_BUFFERS, (None, None))
    if kept_key != key:
        del buffers  # before new ones are allocated
        rows = CohortBuffers(base, key.spec, key.capacity)
        graphed = None
        if base.device.type == "cuda":
            graphed = GraphedPasses(base, rows, key.pass_size, compiled=key.compiled, one_size=key.private)
        buffers = rows, graphed
    return buffers


def keep_buffers(base: Denoiser, key: BuffersKey, buffers: CohortBuffers, graphed: GraphedPasses | None) -> None:
    """Keep buffers for the next call of `take_buffers`.

    Args:
        base: the base.
        key: key for which they were taken.
        buffers: the buffers.
        graphed: graphed passes over them.
    """
    base.cache[_BUFFERS] = key, (buffers, graphed)


def free_buffers(base: Denoiser) -> None:
    """Free the buffers that the last call kept for the next one."""
    base.cache.pop(_BUFFERS, None)


def workers(device: torch.device) -> int:
    """Return the number of concurrent passes: PyTorch's number of threads on a CPU, otherwise one.

    The layers of a small UNet are too small to be split between cores: threads spend most of their time waiting for
    each other, even more so on a busy machine. Therefore each core runs whole passes with single-threaded layers.
    """
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
