"""What one training step takes of a device, predicted without weights and without running it.

`prepare` makes of a network on the meta device what a device would hold: packed weights, slots at its sites,
checkpoints. `footprint` then runs one forward and backward pass of it on tensors without contents (`models.dry_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conf.errors import AntherError
from models.adapter import Sites
from models.denoiser import find_sites
from models.dry_run import DryRun, without_contents
from models.packing import pack_shapes
from models.slots import Layout, add_slots, lend, slot_layers

CHECKPOINTING = ("none", "block")

Inputs = Callable[[int], Mapping[str, Any]]
"""The keyword arguments of a network for so many entries; called where tensors have no contents."""


@dataclass(frozen=True)
class Footprint:
    """One forward and backward pass of one micro-batch, at the moment when it holds most."""

    base_bytes: int
    """Frozen weights, packed or not."""
    activations_bytes: int
    """Tensors of the pass: what autograd keeps, gradients on their way, and the inputs."""
    workspace_bytes: int
    """Dequantised weights of one layer, and what kernels take for themselves (`models.workspace`)."""
    adapter_bytes: int
    """LoRA factors."""
    optimiser_bytes: int
    """Two moments, and the sum of clipped gradients."""
    runtime_bytes: int
    """The process without any of this: Python, PyTorch and what else it imports."""
    matrix_operations: int
    """Multiplications and additions of matrix products and attention, forward and backward."""
    convolution_operations: int
    moved_bytes: int
    """Read and written by everything else, which memory sets the pace of."""

    @property
    def peak_bytes(self) -> int:
        """The most that the process holds at once."""
        held = self.base_bytes + self.activations_bytes + self.workspace_bytes
        return held + self.adapter_bytes + self.optimiser_bytes + self.runtime_bytes


def prepare(network: nn.Module, *, sites: str, weights: str = "fp32", checkpointing: str = "none") -> Sites:
    """Make of a network on the meta device what a device holds of it, in place; its sites.

    Args:
        sites: regular expression on the names of its linear and convolution layers.
        weights: a mode of `models.packing`.
        checkpointing: 'none', or 'block': the activations of every block are computed again on the way back.
    """
    if checkpointing not in CHECKPOINTING:
        raise AntherError(f"checkpointing={checkpointing}: must be one of: {', '.join(CHECKPOINTING)}")
    found = find_sites(network, sites)
    pack_shapes(network, weights)
    add_slots(network, found)
    network.requires_grad_(False).eval()
    if checkpointing == "block":
        network.enable_gradient_checkpointing()  # type: ignore[operator]  # of every diffusers network
    return found


def footprint(
    network: nn.Module,
    inputs: Inputs,
    *,
    sites: Sites,
    rank: int,
    batch: int = 1,
    runtime_bytes: int = 0,
) -> Footprint:
    """Of a network with slots at its `sites`, real or on the meta device; its weights are not looked at.

    Args:
        inputs: what it is called with.
        rank: of the adapter that is trained, at every site.
        batch: entries of a micro-batch, each with a slot of its own as DP-SGD wants them.
        runtime_bytes: passed on to the result.
    """
    layout = Layout(sites, rank)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with without_contents(network, mode) as frozen, mode, DryRun(frozen) as run:
        one_pass(network, inputs, torch.zeros(batch, layout.size), layout)
    return Footprint(
        base_bytes=sum(storage.nbytes() for storage in frozen.values()),
        activations_bytes=run.activations_bytes,
        workspace_bytes=run.workspace_bytes,
        adapter_bytes=4 * layout.size,
        optimiser_bytes=12 * layout.size,
        runtime_bytes=runtime_bytes,
        matrix_operations=run.matrix_operations,
        convolution_operations=run.convolution_operations,
        moved_bytes=run.moved_bytes,
    )


def one_pass(network: nn.Module, inputs: Inputs, rows: Tensor, layout: Layout) -> Tensor:
    """Forward and backward of one entry for each row of adapters [n, D]: their gradients [n, D]."""
    layers = slot_layers(network)
    parts = [part.detach().requires_grad_() for part in rows.split(layout.widths, dim=1)]
    lend(layers, [layout.from_parts(parts)])
    try:
        output = network(**inputs(len(rows)), return_dict=False)[0]
        losses = output.square().flatten(1).mean(1)
        return torch.cat(torch.autograd.grad(losses.sum(), parts), dim=1)
    finally:
        lend(layers, [])
