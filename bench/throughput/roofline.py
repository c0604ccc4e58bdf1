"""Lower bound on the time of a client-step: its operations over the rate of a large matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.lib.workloads import BATCH, TOKENS, Workload, build
from bench.throughput.peers import PeerBatch, add_lora, losses


def operations(workload: Workload) -> int:
    """Count the multiplications and additions of one client-step, forward and backward.

    Counted from shapes for one example, times the batch size, on a UNet with peft's factors: all matrix products and
    convolutions of the forward pass, the backward pass to the activations as far as factors need it, and the gradients
    of the factors.
    """
    meta = torch.device("meta")
    unet = build(workload, meta)
    add_lora(unet, "fp32")
    with meta:
        latents = torch.empty(1, *workload.latent)
        batch = PeerBatch(latents, torch.empty(1), torch.empty(1, TOKENS, workload.width), latents)
    return BATCH * count_operations(lambda: losses(unet, batch).sum().backward())


def count_operations(work: Callable[[], object]) -> int:
    """Count the operations of all matrix products and convolutions in `work`.

    Attention counts as its two products (four in backward), without the recomputation of fused kernels.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Measure the rate of large matrix products.

    Args:
        device: device of the matrices.
        dtype: data type of the matrices.
        repeats: timed products.

    Returns:
        Median operations per second of a product of random n×n matrices, n = 8192 (2048 on a CPU).
    """
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds[3:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
