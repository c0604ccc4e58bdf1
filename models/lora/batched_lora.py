"""LoRA products with a leading slot axis: many adapters share one pass through the frozen base.

Every LoRA tensor is A [S, r, in], B [S, out, r]. A pass of N = S·m entries gives the first m to slot 0, the next m
to slot 1, and so on. Slots are clients (a cohort), examples (DP-SGD: the gradient of a slot *is* the per-example
gradient) or just one (ordinary training, or one adapter for everybody). It is exact because diffusion backbones
normalise per sample and never across the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.lora.adapter import Adapter, Factors, Site, Sites
from models.lora.batched_linear import slot_linear


class BatchedFactors(NamedTuple):
    """Factors of one site in slots: A [S, r, in] and B [S, out, r]; S = 1 serves everyone."""

    a: Tensor
    b: Tensor


BatchedAdapter = Mapping[str, BatchedFactors]


class SlotLayer(nn.Module):
    """A frozen layer that adds the products of the slots that it was lent."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.active_adapters: tuple[BatchedFactors, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        y, others = self.begin(x)
        for stack in others:
            y = y + self.product(x, stack).view_as(y)
        return y

    def begin(self, x: Tensor) -> tuple[Tensor, tuple[BatchedFactors, ...]]:
        """What the frozen layer makes of x, and the stacks whose products are still to be added."""
        return self.base(x), self.active_adapters

    def product(self, x: Tensor, stack: BatchedFactors) -> Tensor:
        raise NotImplementedError


class SlotLinear(SlotLayer):
    """y = W x + Σ B_s A_s x; the stack that is trained, which comes last, shares an operation with W."""

    def begin(self, x: Tensor) -> tuple[Tensor, tuple[BatchedFactors, ...]]:
        trained = self.active_adapters and any(factor.requires_grad for factor in self.active_adapters[-1])
        if not (trained and isinstance(self.base, nn.Linear)):
            return super().begin(x)
        return slot_linear(x, self.base.weight, self.base.bias, *self.active_adapters[-1]), self.active_adapters[:-1]

    def product(self, x: Tensor, stack: BatchedFactors) -> Tensor:
        tokens = x.unflatten(0, (stack.a.shape[0], -1)).flatten(1, -2)  # [S, N/S · tokens, in]
        return torch.bmm(torch.bmm(tokens, stack.a.mT), stack.b.mT)


class SlotConv2d(SlotLayer):
    """The same for a convolution: as in peft, A has its kernel and geometry, and B is 1×1.

    A group of channels for each slot makes it one convolution for all of them.
    """

    def product(self, x: Tensor, stack: BatchedFactors) -> Tensor:
        slots, rank = stack.a.shape[:2]
        grouped = x.unflatten(0, (slots, -1)).transpose(0, 1).flatten(1, 2)  # [N/S, S·c, h, w]
        kernel = stack.a.reshape(slots * rank, x.shape[1], *self.base.kernel_size)
        inner = F.conv2d(grouped, kernel, None, self.base.stride, self.base.padding, self.base.dilation, slots)
        outer = F.conv2d(inner, stack.b.reshape(-1, rank, 1, 1), groups=slots)
        return outer.unflatten(1, (slots, -1)).transpose(0, 1).contiguous()


def add_slots(network: nn.Module, sites: Sites) -> None:
    """Put a slot layer around every site of the network, in place."""
    for name, site in sites.items():
        parent, _, leaf = name.rpartition(".")
        owner = network.get_submodule(parent)
        layer = (SlotConv2d if site.kernel else SlotLinear)(owner.get_submodule(leaf))
        if isinstance(owner, nn.ModuleList | nn.Sequential):
            owner[int(leaf)] = layer
        else:
            setattr(owner, leaf, layer)


def slot_layers(network: nn.Module) -> dict[str, SlotLayer]:
    """Every slot layer of a network by the name of its site."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, SlotLayer)}


def set_adapters(layers: Mapping[str, SlotLayer], adapters: Sequence[BatchedAdapter]) -> None:
    """From now on the network adds the sum of these adapters."""
    for name, layer in layers.items():
        found = (stacks[name] for stacks in adapters if name in stacks)
        layer.active_adapters = tuple(stack for stack in found if stack.a.shape[1] > 0)


class Layout:
    """Where each site's A and B of one rank lie in a flat row of D numbers.

    Adapters, moments, gradients and noise of S slots are [S, D] buffers, so that optimiser, clip and noise are a few
    kernels. Adapters of smaller rank leave zeros, which `pack` places and `mask` tells apart.
    """

    def __init__(self, sites: Sites, rank: int) -> None:
        self.sites, self.rank = dict(sites), rank
        self.widths = [width for site in sites.values() for width in self._widths(site)]
        self.size = sum(self.widths)

    def _widths(self, site: Site) -> tuple[int, ...]:
        return self.rank * site.inputs, self.rank * site.outputs

    @property
    def site_widths(self) -> list[int]:
        """How many numbers of a row each site has."""
        return [sum(self._widths(site)) for site in self.sites.values()]

    def stacks(self, rows: Tensor) -> dict[str, BatchedFactors]:
        """Views of rows [S, D] as the stacks of every site."""
        return self.from_parts(rows.split(self.widths, dim=1))

    def from_parts(self, parts: Sequence[Tensor]) -> dict[str, BatchedFactors]:
        """Stacks of every site from its A and B as [S, r·in] and [S, out·r], site after site."""
        r = self.rank
        return {
            name: BatchedFactors(a.view(len(a), r, site.inputs), b.view(len(b), site.outputs, r))
            for (name, site), a, b in zip(self.sites.items(), parts[::2], parts[1::2], strict=True)
        }

    def fits(self, adapter: Adapter) -> bool:
        """Whether an adapter fills a row, with every site at full rank."""
        return len(adapter) == len(self.sites) and all(f.a.shape[0] == self.rank for f in adapter.values())

    def pack(self, adapter: Adapter | None) -> Tensor:
        """Row [D] of an adapter; missing sites and ranks are zero."""
        if adapter and self.fits(adapter):
            return torch.cat([factor.flatten() for name in self.sites for factor in adapter[name]])
        factors = [factor for f in (adapter or {}).values() for factor in f]
        row = torch.zeros(1, self.size, dtype=factors[0].dtype if factors else torch.float32)
        for name, stack in self.stacks(row).items():
            if adapter and name in adapter:
                r = adapter[name].a.shape[0]
                stack.a[0, :r], stack.b[0, :, :r] = adapter[name]
        return row[0]

    def unpack(self, row: Tensor, like: Adapter) -> Adapter:
        """The adapter in row [D], with the sites and true ranks of `like`; on the CPU, with storage of its own."""
        row = row.detach().cpu().clone()
        if self.fits(like):
            parts, shapes = row.split(self.widths), [factor.shape for name in self.sites for factor in like[name]]
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            return dict(zip(self.sites, map(Factors, views[::2], views[1::2]), strict=True))
        stacks = self.stacks(row[None])
        found = ((name, stacks[name], factors.a.shape[0]) for name, factors in like.items())
        return {name: Factors(stack.a[0, :r].clone(), stack.b[0, :, :r].contiguous()) for name, stack, r in found}

    def mask(self, like: Adapter) -> Tensor:
        """[D] bool: which numbers of a row belong to an adapter with the sites and ranks of `like`."""
        ones = {name: Factors(torch.ones_like(f.a), torch.ones_like(f.b)) for name, f in like.items()}
        return self.pack(ones) != 0


def stack_adapters(sites: Sites, adapters: Sequence[Adapter | None]) -> BatchedAdapter:
    """Adapters laid in slots, padded to the largest rank; one slot if all are the same object, none if all None."""
    if all(adapter is None for adapter in adapters):
        return {}
    if all(adapter is adapters[0] for adapter in adapters):
        adapters = adapters[:1]
    ranks = [f.a.shape[0] for adapter in adapters if adapter for f in adapter.values()]
    layout = Layout(sites, max(ranks, default=0))
    return layout.stacks(torch.stack([layout.pack(adapter) for adapter in adapters]))


def select_slots(stacks: BatchedAdapter, slots: Tensor) -> BatchedAdapter:
    """The stacks of these slots [N], in this order; a stack that serves everyone stays as it is."""
    return {
        name: stack if stack.a.shape[0] == 1 else BatchedFactors(stack.a[slots], stack.b[slots])
        for name, stack in stacks.items()
    }


def to_device(stacks: BatchedAdapter, like: Tensor) -> BatchedAdapter:
    """The same stacks on the device and in the precision of another tensor."""
    return {name: BatchedFactors(stack.a.to(like), stack.b.to(like)) for name, stack in stacks.items()}
