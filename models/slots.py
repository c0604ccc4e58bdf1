"""LoRA products with a leading slot axis: many adapters share one pass through the frozen base.

Every LoRA tensor is A [S, r, in], B [S, out, r], and every example carries the index of its slot. Slots are
clients (a cohort), examples (DP-SGD: the gradient of a slot *is* the per-example gradient) or just one
(ordinary training). It is exact because diffusion backbones normalise per sample and never across the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.adapter import Adapter, Factors, Sites


class Stack(NamedTuple):
    """Adapters of one rank laid in slots: per site A [S, r, in] and B [S, out, r]; S = 1 serves everyone."""

    a: Tensor
    b: Tensor


Stacks = Mapping[str, Stack]


def slot_product(x: Tensor, stack: Stack, index: Tensor) -> Tensor:
    """B_s A_s x for each example's slot s: x [N, …, in], index [N] -> [N, …, out]."""
    a, b = stack
    if a.shape[0] == 1:
        return (x @ a[0].T) @ b[0].T
    tokens = x[:, None] if x.dim() == 2 else x.flatten(1, -2)
    product = torch.bmm(torch.bmm(tokens, a[index].mT), b[index].mT)
    return product.view(*x.shape[:-1], b.shape[1])


class _Lent(threading.local):
    """What the network adds now, in this thread: passes may run side by side."""

    def __init__(self) -> None:
        self.adapters: list[Stacks] = []
        self.index: Tensor | None = None


class SlotLinear(nn.Module):
    """A frozen linear layer that adds the slots' products while its `SlotBank` lends it some."""

    def __init__(self, base: nn.Module, name: str, lent: _Lent) -> None:
        super().__init__()
        self.base, self._name, self._lent = base, name, lent

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for stacks in self._lent.adapters:
            if (stack := stacks.get(self._name)) is not None and stack.a.shape[1] > 0:
                assert self._lent.index is not None
                y = y + slot_product(x, stack, self._lent.index)
        return y


class SlotBank:
    """The adaptable sites of one network."""

    def __init__(self, network: nn.Module, sites: Sites) -> None:
        self._lent = _Lent()
        for name in sites:
            parent, _, leaf = name.rpartition(".")
            owner = network.get_submodule(parent)
            layer = SlotLinear(owner.get_submodule(leaf), name, self._lent)
            if isinstance(owner, nn.ModuleList | nn.Sequential):
                owner[int(leaf)] = layer
            else:
                setattr(owner, leaf, layer)

    @contextmanager
    def using(self, adapters: Iterable[Stacks], index: Tensor) -> Iterator[None]:
        """Within this context the network adds the sum of these adapters; index [N] names each example's slot."""
        self._lent.adapters, self._lent.index = list(adapters), index
        try:
            yield
        finally:
            self._lent.adapters, self._lent.index = [], None


class Layout:
    """Where each site's A and B of one rank lie in a flat row of D numbers.

    Adapters, moments, gradients and noise of S slots are [S, D] buffers, so that optimiser, clip and noise
    are a few kernels. Adapters of smaller rank leave zeros, which `pack` places and `mask` tells apart.
    """

    def __init__(self, sites: Sites, rank: int) -> None:
        self.sites, self.rank = dict(sites), rank
        self.size = sum(rank * (site.inputs + site.outputs) for site in sites.values())

    def stacks(self, rows: Tensor) -> dict[str, Stack]:
        """Views of rows [S, D] as the stacks of every site."""
        result, start, slots, r = {}, 0, rows.shape[0], self.rank
        for name, (inputs, outputs) in self.sites.items():
            middle, end = start + r * inputs, start + r * (inputs + outputs)
            result[name] = Stack(
                rows[:, start:middle].view(slots, r, inputs), rows[:, middle:end].view(slots, outputs, r)
            )
            start = end
        return result

    def pack(self, adapter: Adapter | None) -> Tensor:
        """Row [D] of an adapter; missing sites and ranks are zero."""
        row = torch.zeros(1, self.size)
        for name, stack in self.stacks(row).items():
            if adapter and name in adapter:
                r = adapter[name].a.shape[0]
                stack.a[0, :r], stack.b[0, :, :r] = adapter[name]
        return row[0]

    def unpack(self, row: Tensor, like: Adapter) -> Adapter:
        """The adapter in row [D], with the sites and true ranks of `like`; on the CPU, with storage of its own."""
        stacks = self.stacks(row.detach().cpu()[None])
        return {
            name: Factors(stacks[name].a[0, : f.a.shape[0]].clone(), stacks[name].b[0, :, : f.a.shape[0]].clone())
            for name, f in like.items()
        }

    def mask(self, like: Adapter) -> Tensor:
        """[D] bool: which numbers of a row belong to an adapter with the sites and ranks of `like`."""
        ones = {name: Factors(torch.ones_like(f.a), torch.ones_like(f.b)) for name, f in like.items()}
        return self.pack(ones) != 0


def stack_adapters(sites: Sites, adapters: Sequence[Adapter | None]) -> Stacks:
    """Adapters laid in slots, padded to the largest rank; one slot if all are the same object, none if all None."""
    if all(adapter is None for adapter in adapters):
        return {}
    if all(adapter is adapters[0] for adapter in adapters):
        adapters = adapters[:1]
    ranks = [f.a.shape[0] for adapter in adapters if adapter for f in adapter.values()]
    layout = Layout(sites, max(ranks, default=0))
    return layout.stacks(torch.stack([layout.pack(adapter) for adapter in adapters]))


def to_device(stacks: Stacks, device: torch.device) -> Stacks:
    """The same stacks on another device."""
    return {name: Stack(stack.a.to(device), stack.b.to(device)) for name, stack in stacks.items()}
