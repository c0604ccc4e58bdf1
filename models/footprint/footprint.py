"""What one training step takes of a device, predicted without weights and without running it.

`meta_denoiser` makes of a known base what a device would hold: packed weights, slots at its sites, checkpoints. `footprint`
then runs one forward and backward pass of it, the modules' own code, on tensors without contents (`models.footprint.dry_run`).
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
from models.base.denoiser import Denoiser
from models.diffusion.objective import per_example_loss, rectified_flow
from models.families.known import BaseSpec
from models.footprint.dry_run import DryRun, fake_parameters
from models.footprint.tensor_memory import storages
from models.lora.batched_lora import BatchedAdapter, Layout
from models.quantization.blockwise import fresh_scratch
from models.quantization.layers import QuantizedLayer
from models.quantization.modes import quant_types, quantize_meta

CHECKPOINTING_MODES = ("none", "block")
MARGIN = (
    1.07  # predictions were that much under at most (`bench.memory.predicted`): what a plan accepts must not be killed
)
MODULE_BYTES = 24 << 10
"""Bytes of one of a network's modules, and of the nodes of autograd's graph that it makes.

Fitted on two UNets that `bench.memory.predicted` has not among its cases: its network `runtime`, of 361 modules, and one of
widths 32, 64, 64, 64 with five layers in a block, of 2,115.
"""
DUMMY_SCHEDULE = rectified_flow(1, trained_shift=1.0, shift=1.0)  # `forward_backward` looks at none


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One forward and backward pass of one micro-batch, at the moment when it holds most."""

    base_bytes: int
    """Frozen weights that stay in memory: of a packed base the codes don't, whose file is mapped (`models.base.paging`)."""
    activations_bytes: int = 0
    """Tensors of the pass: what autograd keeps, gradients on their way, and the inputs."""
    workspace_bytes: int = 0
    """Slabs of dequantised weights, with the codes they are read from, and what kernels take for themselves."""
    adapter_bytes: int = 0
    """LoRA factors, as they came and as they are trained."""
    optimiser_bytes: int = 0
    """Two moments, and the sum of clipped gradients."""
    objects_bytes: int = 0
    """What Python and autograd keep for every module of the network."""
    runtime_bytes: int = 0
    """The process without any of this: Python, PyTorch and what else it imports."""
    matrix_operations: int = 0
    """Multiplications and additions of matrix products and attention, forward and backward, with its exponentials."""
    convolution_operations: int = 0
    moved_bytes: int = 0
    """Read and written by everything else, which memory sets the pace of."""

    @property
    def peak_bytes(self) -> int:
        """The most that the process holds at once."""
        held = self.base_bytes + self.activations_bytes + self.workspace_bytes
        return held + self.adapter_bytes + self.optimiser_bytes + self.objects_bytes + self.runtime_bytes


def meta_denoiser(base: BaseSpec, *, sites: str, weights: str = "fp32", checkpointing: str = "none") -> Denoiser:
    """What a device holds of a base, on the meta device.

    Args:
        sites: regular expression on the names of its network's layers.
        weights: one of `models.quantization.modes.MODES`.
        checkpointing: as of Denoiser.
    """
    network = base.network()
    quantize_meta(network, quant_types(network, weights))
    return Denoiser(
        network, DUMMY_SCHEDULE, sites=sites, device="meta", checkpointing=checkpointing, forward=base.family.forward
    )


def copy_for_dry_run(base: Denoiser) -> Denoiser:
    """A base that is there, in the place of `meta_denoiser`: with modules of its own, which may lose their contents."""
    other = copy.copy(base)
    other.network, other._free = base._copy(), SimpleQueue()
    return other


def example_shapes(base: BaseSpec, resolution: int) -> tuple[torch.Size, torch.Size]:
    """The shapes of one picture's latents and of its packed caption.

    Args:
        resolution: side of the picture in pixels.
    """
    config = base.full_config()
    channels, _, patch = base.family.latents(config)
    if resolution % (patch * base.scale):
        raise AntherError(f"resolution={resolution}: must be a multiple of {patch * base.scale} for this base")
    side = resolution // base.scale
    return torch.Size((channels, side, side)), torch.Size(base.family.context(config))


def resident_bytes(base: Denoiser) -> int:
    """Bytes of a base that stay in memory, whatever is done with it."""
    tensors = {id(tensor): tensor for tensor in (*base.network.parameters(), *base.network.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) - sum(codes.nbytes for codes in _mapped(base))


def _mapped(base: Denoiser) -> list[Tensor]:
    """The codes of a packed base: pages of a file, given back once they are read."""
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
    """Of `meta_denoiser` or of a `copy_for_dry_run`, whose tensors become fake ones.

    Args:
        latents, context: shapes of one example.
        rank: of the adapter that is trained.
        batch: entries of a micro-batch, each with a slot of its own as DP-SGD wants them.
        runtime_bytes: passed on to the result.
        sites: that are trained; the adapter's factors at the others stay as they came. None: all.
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
    """How an adapter's trained sites lie in a row, and how the others do."""
    wanted = set(base.sites if sites is None else sites)
    chosen = {name: site for name, site in base.sites.items() if name in wanted}
    return Layout(chosen, rank), Layout({n: site for n, site in base.sites.items() if n not in wanted}, rank)


@contextmanager
def dry_run_mode(base: Denoiser) -> Iterator[DryRun]:
    """What happens in the context happens without contents; so does the base from then on."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    frozen = fake_parameters(base.network, mode)
    with mode, fresh_scratch(), DryRun(frozen, storages(_mapped(base))) as run:
        yield run


def forward_backward(
    base: Denoiser, x: Tensor, context: Tensor, layout: Layout, rows: Tensor, frozen: BatchedAdapter | None = None
) -> Tensor:
    """Forward and backward of entries x [N, c, h, w], one for each row of adapters [N, D]: their gradients [N, D].

    Args:
        frozen: factors beside them that are not trained.
    """
    parts = [part.detach().requires_grad_() for part in rows.split(layout.widths, dim=1)]
    with base.use_adapters([frozen or {}, layout.from_parts(parts)]) as denoise:
        losses = per_example_loss(denoise(x, x.new_zeros(len(x)), context), x)
        return torch.cat(torch.autograd.grad(losses.sum(), parts), dim=1)
