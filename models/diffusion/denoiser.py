"""The frozen network that jobs share: a denoiser on one device, in one precision, with exchangeable adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common.errors import AntherError
from models.diffusion.objective import Schedule
from models.diffusion.sites import ATTENTION, adaptable, find_sites
from models.lora.adapter import Sites
from models.lora.batched_lora import BatchedAdapter, add_slots, set_adapters, slot_layers
from models.quantization.modes import quantize_layers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [N, c, h, w], time [N], context [N, rows, d]) -> prediction [N, c, h, w]."""

Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""`Denoise` with the network as first argument: how a family calls its network."""


def call_unet(
    network: nn.Module, x: Tensor, t: Tensor, context: Tensor, *, timestep_cond: Tensor | None = None
) -> Tensor:
    """Call a UNet whose context consists of text tokens only.

    Args:
        network: UNet2DConditionModel.
        x: [N, c, h, w].
        t: [N].
        context: [N, tokens, d].
        timestep_cond: [N, w], the guidance scale for a UNet that embeds it (`models.families.lcm`).

    Returns:
        Prediction [N, c, h, w].
    """
    guidance = {} if timestep_cond is None else {"timestep_cond": timestep_cond}
    output: Tensor = network(x, t, encoder_hidden_states=context, return_dict=False, **guidance)[0]
    return output


class Denoiser:
    """Frozen diffusers network with slot layers at its sites.

    Args:
        network: changed in place.
        schedule: the forward process.
        sites: a name or regular expression, see `models.diffusion.sites`; None: attention.
        device: torch device.
        compute: precision of weights and activations, 'fp32' | 'bf16' | 'fp64'.
        weights: one of `models.quantization.modes.WEIGHT_MODES`; fp32 leaves the weights unchanged.
        checkpointing: 'none', or 'block' to recompute each block's forward in the backward pass (Chen et al., 2016,
            arXiv:1604.06174).
        forward: function that calls the network.
        attention: regular expression on the names of the family's default sites.

    Attributes:
        sites: adapted layers by name.
        attention: the argument.
        schedule: the forward process, on `device`.
        checkpointing: the argument.
        cache: values that users of this network store with it, for its lifetime.
        full_precision: dtype of x_t, losses, adapters and gradients: float32, or higher if `compute` is.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        *,
        sites: str | None,
        device: str = "cpu",
        compute: str = "fp32",
        weights: str = "fp32",
        checkpointing: str = "none",
        forward: Forward = call_unet,
        attention: str = ATTENTION,
    ) -> None:
        self._adaptable = adaptable(network)
        self.sites: Sites = find_sites(network, sites, attention=attention)
        self.attention = attention
        quantize_layers(network, weights)
        self.device, self.dtype = torch.device(device), PRECISIONS[compute]
        self.full_precision = torch.promote_types(self.dtype, torch.float32)
        self.schedule, self.checkpointing, self._forward = schedule.to(self.device), checkpointing, forward
        add_slots(network, self.sites)
        if checkpointing == "block":  # no RNG state: the network draws no random numbers
            recompute: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            cast(Any, network).enable_gradient_checkpointing(recompute)
        network = network.requires_grad_(False).eval()
        self.network = nn.Module.to(network, self.device, self.dtype)  # diffusers' own `to` warns without a reason
        if self.device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.cache: dict[Any, Any] = {}
        self._free: SimpleQueue[nn.Module] = SimpleQueue()  # idle copies; `network` itself never carries adapters

    def set_sites(self, names: Collection[str]) -> None:
        """Move the adapters to other layers without loading the network again; `sites` keeps the network's order.

        Raises:
            AntherError: a name is unknown or repeated, or `names` is empty.
        """
        distinct = set(names)
        unknown = min(distinct - self._adaptable.keys(), default=None)
        if unknown is not None:
            raise AntherError(f"site {unknown[:100]}: the base has no such layer to adapt")
        if not 0 < len(distinct) == len(names):
            raise AntherError(f"{len(names)} sites with {len(distinct)} distinct names: name each site once")
        if distinct == self.sites.keys():
            return
        self.sites = {name: site for name, site in self._adaptable.items() if name in distinct}
        add_slots(self.network, {name: self.sites[name] for name in distinct - slot_layers(self.network).keys()})
        self._free, self.cache = SimpleQueue(), {}  # both belonged to the previous sites

    @property
    def like(self) -> Tensor:
        """Return an empty tensor [0] with the network's device and dtype."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @contextmanager
    def use_adapters(self, adapters: Sequence[BatchedAdapter], *, compiled: bool = False) -> Iterator[Denoise]:
        """Yield the network with the sum of these adapters, reserved for the caller; examples are ordered by slot.

        Backward passes must run inside the context: a checkpointed block runs its forward again. Concurrent contexts
        in several threads each get a copy of the modules, which share their weights.

        Args:
            adapters: factors with a leading slot axis, by site.
            compiled: run the network through torch.compile, which compiles again for each input shape.
        """
        try:
            network = self._free.get_nowait()
        except Empty:
            network = self._copy()
        run = self._compiled if compiled else _run
        try:
            with self._attention():
                yield lambda x, t, context: run(self._forward, network, x, t, context, adapters)
        finally:
            set_adapters(slot_layers(network), [])
            self._free.put(network)

    @cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        # Inductor keeps channels first if any convolution narrows; backward would then copy every layer's inputs.
        return torch.compile(_run, dynamic=False, options={"force_layout_optimization": True})

    def _attention(self) -> AbstractContextManager[None]:
        """Prefer cuDNN's attention on a GPU: it is the fastest at the head size of Stable Diffusion 1.5."""
        return sdpa_kernel(_ATTENTION, set_priority=True) if self.device.type == "cuda" else nullcontext()

    def _copy(self) -> nn.Module:
        shared = {id(tensor): tensor for tensor in chain(self.network.parameters(), self.network.buffers())}
        return copy.deepcopy(self.network, shared)


def _run(
    forward: Forward, network: nn.Module, x: Tensor, t: Tensor, context: Tensor, adapters: Sequence[BatchedAdapter]
) -> Tensor:
    """Run the network with adapters in its own precision."""
    set_adapters(slot_layers(network), adapters)
    dtype = next(network.parameters()).dtype
    return forward(network, x.to(dtype), t, context.to(dtype))
