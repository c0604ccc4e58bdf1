"""Predict the memory and work of one training step, without weights and without running it.

`meta_denoiser` builds a known base as on a device: packed weights, slot layers, checkpointing. `footprint`
then runs one forward and backward pass of the modules' own code on tensors without data (`models.footprint.dry_run`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import AntherError
from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import per_example_loss, rectified_flow
from models.families.known import BaseSpec
from models.footprint.dry_run import DryRun, fake_parameters
from models.footprint.tensor_memory import storages
from models.lora.batched_lora import BatchedAdapter, Layout
from models.quantization.blockwise import fresh_scratch
from models.quantization.layers import QuantizedLayer
from models.quantization.modes import quant_types, quantize_meta

CHECKPOINTING_MODES = ("none", "block")
# predictions were at most this factor too low (`bench.memory.predicted`): a plan within limits must not run out of
# memory
MARGIN = 1.07
MODULE_BYTES = 24 << 10
"""Bytes of Python and autograd objects per module of a network.

Fitted on two UNets outside the cases of `bench.memory.predicted`: its network `runtime`, of 361 modules, and one of
widths 32, 64, 64, 64 with five layers per block, of 2,115.
"""
DUMMY_SCHEDULE = rectified_flow(1, trained_shift=1.0, shift=1.0)  # `forward_backward` doesn't use it


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of one forward and backward pass of a microbatch, at the moment of its peak, and work of the pass."""

    base_bytes: int
    """Frozen weights that stay in memory. Codes of a packed base don't: their file is mapped
    (`models.files.paging`)."""
    activations_bytes: int = 0
    """Tensors of the pass: saved by autograd, intermediate gradients, and inputs."""
    workspace_bytes: int = 0
    """Slabs of dequantized weights, the codes that they are read from, and temporary buffers of kernels."""
    adapter_bytes: int = 0
    """LoRA factors, the received and the trained ones."""
    optimiser_bytes: int = 0
    """Two moments, and the sum of clipped gradients. The name is stored in results; don't change."""
    objects_bytes: int = 0
    """Python and autograd objects of the network's modules."""
    runtime_bytes: int = 0
    """Process without a network: Python, PyTorch and other imports."""
    matrix_operations: int = 0
    """Multiplications and additions of matrix products and attention, with its exponentials, forward and backward."""
    convolution_operations: int = 0
    moved_bytes: int = 0
    """Bytes read and written by all other operations, which are limited by memory bandwidth."""

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the process."""
        tensors = self.base_bytes + self.activations_bytes + self.workspace_bytes
        return tensors + self.adapter_bytes + self.optimiser_bytes + self.objects_bytes + self.runtime_bytes


def meta_denoiser(base: BaseSpec, *, sites: str | None, weights: str = "fp32", checkpointing: str = "none") -> Denoiser:
    """Build a base as on a device, but on the meta device.

    Args:
        base: published base, or base of a folder (`models.families.known`).
        sites: see `Base`.
        weights: one of `models.quantization.modes.WEIGHT_MODES`.
        checkpointing: see `Denoiser`.
    """
    network = base.network()
    quantize_meta(network, quant_types(network, weights))
    return Denoiser(
        network,
        DUMMY_SCHEDULE,
        sites=sites,
        device="meta",
        checkpointing=checkpointing,
        forward=base.family.forward,
        attention=base.family.sites,
    )


def copy_for_dry_run(base: Denoiser) -> Denoiser:
    """Copy a loaded base for use in place of `meta_denoiser`, with its own modules, which may lose their data."""
    copied = copy.copy(base)
    copied.network, copied._free = base._copy(), SimpleQueue()
    return copied


def example_shapes(base: BaseSpec, resolution: int) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of one image's latents [c, h, w] and of its packed caption [rows, d].

    Args:
        base: base of `models.families.known`.
        resolution: side of the image in pixels.
    """
    config = base.full_config()
    channels, _, patch = base.family.latents(config)
    if resolution % (patch * base.scale):
        raise AntherError(f"resolution={resolution}: must be a multiple of {patch * base.scale} for this base")
    side = resolution // base.scale
    return torch.Size((channels, side, side)), torch.Size(base.family.context(config))


def resident_bytes(base: Denoiser) -> int:
    """Return the bytes of a base that always stay in memory."""
    tensors = {id(tensor): tensor for tensor in (*base.network.parameters(), *base.network.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) - sum(codes.nbytes for codes in _mapped(base))


def _mapped(base: Denoiser) -> list[Tensor]:
    """Return the codes of a packed base: pages of a file, released after reading."""
    return [layer.codes for layer in base.network.modules() if isinstance(layer, QuantizedLayer)]


def footprint(
    base: Denoiser,
    latents: torch.Size,
    context: torch.Size,
    *,
    rank: int,
    batch: int = 1,
    runtime_bytes: int = 0,
    sites: Collection[str] | None = None,
) -> Footprint:
    """Predict one forward and backward pass.

    Args:
        base: result of `meta_denoiser` or `copy_for_dry_run`; its tensors become fake.
        latents: shape of one example's latents.
        context: shape of one example's packed caption.
        rank: rank of the trained adapter.
        batch: examples per microbatch, each with its own slot as in DP-SGD.
        runtime_bytes: copied to the result.
        sites: trained sites; the adapter is frozen at the others. None: all are trained.
    """
    trained, frozen = split_layout(base, rank, sites)
    with dry_run_mode(base) as run:
        x, texts = (torch.zeros(batch, *shape) for shape in (latents, context))
        forward_backward(
            base, x, texts, trained, torch.zeros(batch, trained.size), frozen.stacks(torch.zeros(1, frozen.size))
        )
    return Footprint(
        base_bytes=resident_bytes(base),
        activations_bytes=run.activations_bytes,
        workspace_bytes=run.workspace_bytes,
        adapter_bytes=8 * trained.size,
        optimiser_bytes=12 * trained.size,
        objects_bytes=MODULE_BYTES * len(list(base.network.modules())),
        runtime_bytes=runtime_bytes,
        matrix_operations=run.matrix_operations,
        convolution_operations=run.convolution_operations,
        moved_bytes=run.moved_bytes,
    )


def split_layout(base: Denoiser, rank: int, sites: Collection[str] | None) -> tuple[Layout, Layout]:
    """Return the row layouts of the trained sites and of the other sites.

    Args:
        base: the network.
        rank: rank of the adapter.
        sites: trained sites; None: all.
    """
    trained = set(base.sites if sites is None else sites)
    selected = {name: site for name, site in base.sites.items() if name in trained}
    return Layout(selected, rank), Layout({n: site for n, site in base.sites.items() if n not in trained}, rank)


@contextmanager
def dry_run_mode(base: Denoiser) -> Iterator[DryRun]:
    """Create tensors without data within this context; the base has no data from then on."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    frozen = fake_parameters(base.network, mode)
    with mode, fresh_scratch(), DryRun(frozen, storages(_mapped(base))) as run:
        yield run


def forward_backward(
    base: Denoiser, x: Tensor, context: Tensor, layout: Layout, rows: Tensor, frozen: BatchedAdapter | None = None
) -> Tensor:
    """Run forward and backward of one example per row.

    Args:
        base: the network.
        x: [N, c, h, w].
        context: [N, rows, d].
        layout: layout of the rows.
        rows: trained adapters [N, D].
        frozen: further factors that are not trained.

    Returns:
        Gradients of the rows [N, D].
    """
    parts = [part.detach().requires_grad_() for part in rows.split(layout.widths, dim=1)]
    with base.use_adapters([frozen or {}, layout.from_parts(parts)]) as denoise:
        losses = per_example_loss(denoise(x, x.new_zeros(len(x)), context), x)
        return torch.cat(torch.autograd.grad(losses.sum(), parts), dim=1)
