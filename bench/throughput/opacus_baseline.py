"""DP-SGD on LoRA for one client at a time, with minimal overhead."""

from __future__ import annotations

import math
import re
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.lib.workloads import BATCH, LEARNING_RATE, PRIVACY, RANK, SITES
from bench.throughput.peers import PeerBatch, draw, losses
from models.diffusion.objective import Schedule
from training.jobs import Examples

LARGEST = 8  # examples per pass; 1 % of the Poisson batches are larger, and take two passes
WARM_UP = 3  # runs before a capture, on another stream, as CUDA graphs require
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Order of preference in a capture, like the cohort's: cuDNN's launch is the slowest, which a graph hides."""


class LoraLinear(nn.Module):
    """A frozen linear layer with a LoRA branch."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base = base
        self.a = nn.Linear(base.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class PerExampleGradients:
    """Per-example gradients of linear layers without bias, concatenated in `rows` `[n, D]`.

    For y = x Wᵀ with output gradient g `[n, T, out]`, the gradient is gᵀ x. Tensor hooks read g during the backward
    pass, so the weights need no gradient of their own and autograd spends no time on them. Set `rows` before the
    forward pass.
    """

    rows: Tensor

    def __init__(self, layers: list[nn.Linear]) -> None:
        start = 0
        for layer in layers:
            layer.register_forward_hook(partial(self._watch, start))
            start += layer.weight.numel()

    def _watch(self, start: int, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        if torch.is_grad_enabled():
            if not output.requires_grad:  # the first layer of the network: the backward pass ends here
                output.requires_grad_()
            output.register_hook(partial(self._store, start, layer.weight, inputs[0].detach()))

    def _store(self, start: int, weight: Tensor, x: Tensor, g: Tensor) -> None:
        gradient = self.rows[:, start : start + weight.numel()].unflatten(1, weight.shape)
        torch.bmm(g.mT, x, out=gradient)


class HooksPeer:
    """One client's DP-SGD: fp32 factors in a flat buffer, and a copy in the base's precision that the layers use.

    Args:
        unet: the frozen network.
        examples: the client's examples.
        schedule: the noise schedule.
        graphs: whether to replay all work as CUDA graphs, one for each batch size, without time in Python or padding.
    """

    def __init__(self, unet: nn.Module, examples: Examples, schedule: Schedule, *, graphs: bool) -> None:
        self.examples, self.schedule = examples, schedule
        device, dtype = examples.latents.device, next(unet.parameters()).dtype
        layers = add_factors(unet)
        layout = torch.channels_last if graphs else torch.preserve_format
        self.unet = unet.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.per_example = PerExampleGradients(layers)
        self.flat = nn.Parameter(torch.cat([layer.weight.detach().flatten() for layer in layers]).to(device).float())
        self.compute_flat = self.flat.detach().to(dtype)  # the same buffer if the dtype is the same
        for layer, part in zip(
            layers, self.compute_flat.split([layer.weight.numel() for layer in layers]), strict=True
        ):
            layer.weight = nn.Parameter(part.view_as(layer.weight), requires_grad=False)
        self.total, self.gradient = (
            torch.zeros_like(self.compute_flat, dtype=torch.float32),
            torch.zeros_like(self.flat),
        )
        self.flat.grad = self.gradient
        self.optimizer = torch.optim.AdamW(
            [self.flat], LEARNING_RATE, weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )
        self.index_buffers = [torch.zeros(size, dtype=torch.long, device=device) for size in range(LARGEST + 1)]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if graphs:
            with sdpa_kernel(ATTENTION, set_priority=True):
                self._capture()

    def step(self, pictures: Tensor) -> None:
        """Run one step; an empty batch adds only noise."""
        self.total.zero_()
        if len(pictures):
            for part in pictures.chunk(math.ceil(len(pictures) / LARGEST)):
                self.index_buffers[len(part)].copy_(part)
                self._run(len(part))
        self._run(0)

    def gradients(self, batch: PeerBatch) -> Tensor:
        """Return the gradient of each example `[n, D]`."""
        self.per_example.rows = self.compute_flat.new_empty(len(batch.t), len(self.flat))
        losses(self.unet, batch).sum().backward()
        return self.per_example.rows

    def _run(self, size: int) -> None:
        if self.graphs:
            self.graphs[size].replay()
        else:
            self._work(size)

    def _work(self, size: int) -> None:
        """Clip and sum the gradients of `size` examples; with size 0, add noise, scale and run AdamW."""
        if size:
            rows = self.gradients(draw(self.examples, self.schedule, self.index_buffers[size])).float()
            norms = torch.linalg.vector_norm(rows, dim=1)
            self.total += (PRIVACY.clip / (norms + 1e-6)).clamp_max(1.0) @ rows
            return
        deviation = PRIVACY.noise_multiplier * PRIVACY.clip
        torch.add(self.total, torch.randn_like(self.total), alpha=deviation, out=self.gradient)
        self.gradient /= BATCH
        self.optimizer.step()
        if self.compute_flat.dtype != self.flat.dtype:
            self.compute_flat.copy_(self.flat.detach())

    def _capture(self) -> None:
        """Capture a graph for every size; factors and optimizer state are reset afterwards."""
        start = self.flat.detach().clone()
        pool = torch.cuda.graph_pool_handle()  # shared, the largest graph first: nothing in it outlives a replay
        for size in reversed(range(LARGEST + 1)):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._work(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._work(size)
            self.graphs[size] = graph
        for tensor in self.optimizer.state[self.flat].values():
            tensor.zero_()
        with torch.no_grad():
            self.flat.copy_(start)
            self.compute_flat.copy_(start)


def add_factors(unet: nn.Module) -> list[nn.Linear]:
    """Put LoRA layers into a UNet, and return their A and B, site by site."""
    layers = []
    for name in [name for name, _ in unet.named_modules() if re.fullmatch(SITES, name)]:
        parent, _, leaf = name.rpartition(".")
        lora = LoraLinear(unet.get_submodule(name))
        unet.get_submodule(parent).register_module(leaf, lora)
        layers += [lora.a, lora.b]
    return layers
