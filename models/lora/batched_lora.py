"""LoRA products with a leading slot axis: many adapters share one pass through the frozen base.

LoRA tensors are A [S, r, in] and B [S, out, r]. In a pass of N = S·m examples the first m belong to slot 0, the next m
to slot 1, and so on. A slot is a client (in a cohort) or an example (in DP-SGD, where the gradient of a slot *is*
the per-example gradient); in ordinary training, or with one adapter shared by all examples, there is a single slot.
Results are exact because diffusion backbones normalize per sample and never across the batch.
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
    """Factors of one site in slots: A [S, r, in] and B [S, out, r]; S = 1 applies to all examples."""

    a: Tensor
    b: Tensor


BatchedAdapter = Mapping[str, BatchedFactors]


class SlotLayer(nn.Module):
    """Frozen layer that adds the products of its active adapters."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.active_adapters: tuple[BatchedFactors, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + Σ B_s A_s x.

        Args:
            x: [N, …, in] of a linear layer, or [N, c, h, w] of a convolution.

        Returns:
            [N, …, out], or [N, out, h', w'].
        """
        y, remaining = self.begin(x)
        for factors in remaining:
            y = y + self.product(x, factors).view_as(y)
        return y

    def begin(self, x: Tensor) -> tuple[Tensor, tuple[BatchedFactors, ...]]:
        """Start the forward pass.

        Args:
            x: see `forward`.

        Returns:
            The layer's output so far, shaped as that of `forward`, and the factors whose products still have to be
            added.
        """
        return self.base(x), self.active_adapters

    def product(self, x: Tensor, factors: BatchedFactors) -> Tensor:
        """Compute B_s A_s x for the examples of each slot.

        Args:
            x: see `forward`.
            factors: A [S, r, in] and B [S, out, r]. S divides N.

        Returns:
            The elements of the layer's output, in the same order but split by slot: [S, N/S · …, out], or
            [S, N/S, out, h', w'].
        """
        raise NotImplementedError


class SlotLinear(SlotLayer):
    """y = W x + Σ B_s A_s x. The trained factors, which come last, share one operation with W."""

    def begin(self, x: Tensor) -> tuple[Tensor, tuple[BatchedFactors, ...]]:
        """See `SlotLayer.begin`."""
        trained = self.active_adapters and any(factor.requires_grad for factor in self.active_adapters[-1])
        if not (trained and isinstance(self.base, nn.Linear)):
            return super().begin(x)
        return slot_linear(x, self.base.weight, self.base.bias, *self.active_adapters[-1]), self.active_adapters[:-1]

    def product(self, x: Tensor, factors: BatchedFactors) -> Tensor:
        """See `SlotLayer.product`."""
        tokens = x.unflatten(0, (factors.a.shape[0], -1)).flatten(1, -2)  # [S, N/S · tokens, in]
        return torch.bmm(torch.bmm(tokens, factors.a.mT), factors.b.mT)


class SlotConv2d(SlotLayer):
    """Convolution with LoRA as in peft: A has the layer's kernel and geometry, and B is 1×1.

    With one group of channels per slot, a single convolution computes all slots.
    """

    def product(self, x: Tensor, factors: BatchedFactors) -> Tensor:
        """See `SlotLayer.product`."""
        slots, rank = factors.a.shape[:2]
        grouped = x.unflatten(0, (slots, -1)).transpose(0, 1).flatten(1, 2)  # [N/S, S·c, h, w]
        kernel = factors.a.reshape(slots * rank, x.shape[1], *self.base.kernel_size)
        inner = F.conv2d(grouped, kernel, None, self.base.stride, self.base.padding, self.base.dilation, slots)
        outer = F.conv2d(inner, factors.b.reshape(-1, rank, 1, 1), groups=slots)
        return outer.unflatten(1, (slots, -1)).transpose(0, 1).contiguous()


def add_slots(network: nn.Module, sites: Sites) -> None:
    """Wrap every site of the network in a slot layer, in place."""
    for name, site in sites.items():
        parent, _, leaf = name.rpartition(".")
        owner = network.get_submodule(parent)
        layer = (SlotConv2d if site.kernel else SlotLinear)(owner.get_submodule(leaf))
        if isinstance(owner, nn.ModuleList | nn.Sequential):
            owner[int(leaf)] = layer
        else:
            setattr(owner, leaf, layer)


def slot_layers(network: nn.Module) -> dict[str, SlotLayer]:
    """Return every slot layer of a network by its site's name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, SlotLayer)}


def set_adapters(layers: Mapping[str, SlotLayer], adapters: Sequence[BatchedAdapter]) -> None:
    """Make the layers add the sum of these adapters, each A [S, r, in] and B [S, out, r]; rank 0 is skipped."""
    for name, layer in layers.items():
        present = (adapter[name] for adapter in adapters if name in adapter)
        layer.active_adapters = tuple(factors for factors in present if factors.a.shape[1] > 0)


class Layout:
    """Positions of A and B of every site, at one rank, in a flat row of D numbers.

    Adapters, moments, gradients and noise of S slots are [S, D] buffers, so that optimizer, clipping and noise take
    only a few kernels. Adapters of smaller rank are padded with zeros by `pack`; `mask` marks the padding.
    """

    def __init__(self, sites: Sites, rank: int) -> None:
        self.sites, self.rank = dict(sites), rank
        self.widths = [width for site in sites.values() for width in self._widths(site)]
        self.size = sum(self.widths)

    def _widths(self, site: Site) -> tuple[int, ...]:
        return self.rank * site.inputs, self.rank * site.outputs

    @property
    def site_widths(self) -> list[int]:
        """Numbers per row of each site."""
        return [sum(self._widths(site)) for site in self.sites.values()]

    def stacks(self, rows: Tensor) -> dict[str, BatchedFactors]:
        """View rows [S, D] as batched factors of every site."""
        return self.from_parts(rows.split(self.widths, dim=1))

    def from_parts(self, parts: Sequence[Tensor]) -> dict[str, BatchedFactors]:
        """Build batched factors of every site from its A and B as [S, r·in] and [S, out·r], in site order."""
        r = self.rank
        return {
            name: BatchedFactors(a.view(len(a), r, site.inputs), b.view(len(b), site.outputs, r))
            for (name, site), a, b in zip(self.sites.items(), parts[::2], parts[1::2], strict=True)
        }

    def fits(self, adapter: Adapter) -> bool:
        """Return whether an adapter fills a row: all sites, each at full rank."""
        return len(adapter) == len(self.sites) and all(a.shape[0] == self.rank for a, _ in adapter.values())

    def pack(self, adapter: Adapter | None) -> Tensor:
        """Return the row [D] of an adapter; missing sites and ranks are zero."""
        if adapter and self.fits(adapter):
            return torch.cat([factor.flatten() for name in self.sites for factor in adapter[name]])
        factors = [factor for f in (adapter or {}).values() for factor in f]
        row = torch.zeros(1, self.size, dtype=factors[0].dtype if factors else torch.float32)
        for name, batched in self.stacks(row).items():
            if adapter and name in adapter:
                r = adapter[name].a.shape[0]
                batched.a[0, :r], batched.b[0, :, :r] = adapter[name]
        return row[0]

    def unpack(self, row: Tensor, like: Adapter) -> Adapter:
        """Return the adapter in row [D], with the sites and ranks of `like`; on the CPU, with its own storage."""
        row = row.detach().cpu().clone()
        if self.fits(like):
            shapes = [factor.shape for name in self.sites for factor in like[name]]
            views = list(map(torch.Tensor.view, row.split(self.widths), shapes))
            return dict(zip(self.sites, map(Factors, views[::2], views[1::2]), strict=True))
        stacks = self.stacks(row[None])
        present = ((name, stacks[name], factors.a.shape[0]) for name, factors in like.items())
        return {name: Factors(s.a[0, :r].clone(), s.b[0, :, :r].contiguous()) for name, s, r in present}

    def mask(self, like: Adapter) -> Tensor:
        """Return [D] bool: the numbers of a row that an adapter with the sites and ranks of `like` uses."""
        ones = {name: Factors(torch.ones_like(f.a), torch.ones_like(f.b)) for name, f in like.items()}
        return self.pack(ones) != 0


def stack_adapters(sites: Sites, adapters: Sequence[Adapter | None]) -> BatchedAdapter:
    """Stack adapters along the slot axis, padded with zeros to the largest rank.

    Args:
        sites: dimensions by name.
        adapters: adapter of each of the S slots; None: zero.

    Returns:
        A [S, r, in] and B [S, out, r] per site; [1, …] if all adapters are the same object. Empty if all are None.
    """
    if all(adapter is None for adapter in adapters):
        return {}
    if all(adapter is adapters[0] for adapter in adapters):
        adapters = adapters[:1]
    ranks = [f.a.shape[0] for adapter in adapters if adapter for f in adapter.values()]
    layout = Layout(sites, max(ranks, default=0))
    return layout.stacks(torch.stack([layout.pack(adapter) for adapter in adapters]))


def select_slots(stacks: BatchedAdapter, slots: Tensor) -> BatchedAdapter:
    """Return the factors of these slots [N], in this order; factors with a single slot are returned unchanged."""
    return {
        name: factors if factors.a.shape[0] == 1 else BatchedFactors(factors.a[slots], factors.b[slots])
        for name, factors in stacks.items()
    }


def to_device(stacks: BatchedAdapter, like: Tensor) -> BatchedAdapter:
    """Move an adapter to the device and the dtype of `like`, a tensor of any shape."""
    return {name: BatchedFactors(factors.a.to(like), factors.b.to(like)) for name, factors in stacks.items()}
