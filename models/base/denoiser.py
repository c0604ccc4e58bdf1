"""The frozen network that jobs share: a denoiser on one device, in one precision, that can be lent adapters."""

from __future__ import annotations

import copy
import re
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
from models.lora.adapter import Site, Sites
from models.lora.batched_lora import BatchedAdapter, add_slots, set_adapters, slot_layers
from models.quantization.layers import QuantizedConv2d, QuantizedLinear
from models.quantization.modes import quantize_layers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [N, c, h, w], time [N], context [N, rows, d]) -> what the network predicts [N, c, h, w]."""

Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""The same, with the network first: how a family of networks is called."""


def call_unet(
    network: nn.Module, x: Tensor, t: Tensor, context: Tensor, *, timestep_cond: Tensor | None = None
) -> Tensor:
    """The forward of a UNet whose context is tokens [N, tokens, d] and nothing else.

    Args:
        timestep_cond: [N, w], the strength of guidance for a UNet that embeds it (`models.families.lcm`).
    """
    guidance = {} if timestep_cond is None else {"timestep_cond": timestep_cond}
    output: Tensor = network(x, t, encoder_hidden_states=context, return_dict=False, **guidance)[0]
    return output


class Denoiser:
    """A frozen network of diffusers with slots at its sites.

    Args:
        network: changed in place.
        sites: regular expression on the names of its linear and convolution layers.
        compute: precision of weights and activations, 'fp32' | 'bf16' | 'fp64'.
        weights: how its layers' weights are held, one of `models.quantization.modes.MODES`; fp32: as they are.
        checkpointing: 'none', or 'block': backward runs each block's forward again, rather than keep what is in it.
        forward: how it is called.

    Attributes:
        sites: the adaptable layers, by their name in the network.
        schedule: the forward process.
        checkpointing: as it was given.
        kept: what those who use this network keep with it, for as long as it lives.
        precise: dtype of everything that is not the network: x_t, losses, adapters, gradients; float32 or better.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        *,
        sites: str,
        device: str = "cpu",
        compute: str = "fp32",
        weights: str = "fp32",
        checkpointing: str = "none",
        forward: Forward = call_unet,
    ) -> None:
        self._able = adaptable(network)
        self.sites: Sites = find_sites(network, sites)
        quantize_layers(network, weights)
        self.device, self.dtype = torch.device(device), PRECISIONS[compute]
        self.full_precision = torch.promote_types(self.dtype, torch.float32)
        self.schedule, self.checkpointing, self._forward = schedule.to(self.device), checkpointing, forward
        add_slots(network, self.sites)
        if checkpointing == "block":  # without the state of random numbers: nothing here draws any
            again: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            cast(Any, network).enable_gradient_checkpointing(again)
        network = network.requires_grad_(False).eval()
        self.network = nn.Module.to(network, self.device, self.dtype)  # that of diffusers warns without a reason
        if self.device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.cache: dict[Any, Any] = {}
        self._free: SimpleQueue[nn.Module] = SimpleQueue()  # copies of the network, which itself is never lent

    def set_sites(self, names: Collection[str]) -> None:
        """Move the adapters to the layers of these names, in the network's order; nothing is loaded again.

        Raises AntherError for no name, one that is there twice, or one of no layer that can be adapted.
        """
        wanted = set(names)
        unknown = min(wanted - self._able.keys(), default=None)
        if unknown is not None:
            raise AntherError(f"site {unknown[:100]}: the base has no such layer to adapt")
        if not 0 < len(wanted) == len(names):
            raise AntherError(f"{len(names)} sites are named, {len(wanted)} of them different")
        if wanted == self.sites.keys():
            return
        self.sites = {name: site for name, site in self._able.items() if name in wanted}
        add_slots(self.network, {name: self.sites[name] for name in wanted - slot_layers(self.network).keys()})
        self._free, self.cache = SimpleQueue(), {}  # both are of the sites before

    @property
    def like(self) -> Tensor:
        """An empty tensor of the network's device and precision."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @contextmanager
    def use_adapters(self, adapters: Sequence[BatchedAdapter], *, compiled: bool = False) -> Iterator[Denoise]:
        """The network with the sum of these adapters, for the caller alone; entries in the order of their slots.

        Backward passes belong inside the context too: a checkpointed block runs its forward again there. Passes in
        several threads each get a copy of the modules, which share their weights.

        Args:
            compiled: run the network through torch.compile, anew for each shape of its inputs.
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
        # Inductor keeps channels first where any convolution narrows; backward would then copy every layer's pictures.
        return torch.compile(_run, dynamic=False, options={"force_layout_optimization": True})

    def _attention(self) -> AbstractContextManager[None]:
        """On a GPU cuDNN's attention first: at the head size of Stable Diffusion 1.5 it is the fastest."""
        return sdpa_kernel(_ATTENTION, set_priority=True) if self.device.type == "cuda" else nullcontext()

    def _copy(self) -> nn.Module:
        lent = {id(tensor): tensor for tensor in chain(self.network.parameters(), self.network.buffers())}
        return copy.deepcopy(self.network, lent)


def _run(
    forward: Forward, network: nn.Module, x: Tensor, t: Tensor, context: Tensor, adapters: Sequence[BatchedAdapter]
) -> Tensor:
    """The network's output with adapters, in its own precision."""
    set_adapters(slot_layers(network), adapters)
    dtype = next(network.parameters()).dtype
    return forward(network, x.to(dtype), t, context.to(dtype))


def find_sites(network: nn.Module, pattern: str) -> dict[str, Site]:
    """The linear and convolution layers whose whole name matches a regular expression, in the network's order."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise AntherError(f"adapter.sites={pattern}: not a regular expression ({error})") from error
    able = adaptable(network)
    sites = {name: site for name, site in able.items() if wanted.fullmatch(name)}
    if not sites:
        raise AntherError(f"adapter.sites={pattern}: matches no layer of the base, such as {next(iter(able))}")
    return sites


def adaptable(network: nn.Module) -> dict[str, Site]:
    """Every linear and convolution layer that an adapter can sit at, by its name, in the network's order."""
    return {name: site for name, layer in network.named_modules() if (site := _site(layer))}


def _site(layer: nn.Module) -> Site | None:
    """What an adapter needs to know of a layer that it can adapt."""
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return Site(layer.in_features, layer.out_features)
    if isinstance(layer, QuantizedConv2d):
        return Site(layer.shape[1:].numel(), layer.out_channels, layer.kernel_size)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        return Site(layer.weight[0].numel(), layer.out_channels, layer.kernel_size)
    return None
