"""What is trained of an adapter, and what of it stays: the names and shapes that travel, and how they lie in a row.

    both    A and B                                   <site>.lora_A, <site>.lora_B
    a       A; B stays                                <site>.lora_A
    b       B; A stays                                <site>.lora_B
    cores   C [r, r] of B = L C; A and L stay         <site>.core
    split   A and B, of which B stays on the device   <site>.lora_A

What stays is fixed: the same for everybody who trains from one adapter. It is part of no gradient, so that clip, noise
and optimiser see no number of it, and it never travels up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors, Site, Sites
from models.lora.batched_lora import BatchedFactors, Layout


class Part(NamedTuple):
    """One of the tensors of a site that travel."""

    name: str
    shape: Callable[[Site, int], tuple[int, ...]]
    """Of a site and a rank."""


_A = Part("lora_A", lambda site, rank: (rank, site.inputs))
_B = Part("lora_B", lambda site, rank: (site.outputs, rank))
_C = Part("core", lambda site, rank: (rank, rank))  # noqa: ARG005  # all sites have cores of one size

TRAINED_TENSORS: Mapping[str, tuple[Part, ...]] = {
    "both": (_A, _B),
    "a": (_A,),
    "b": (_B,),
    "cores": (_C,),
    "split": (_A,),
}


def trained_shapes(sites: Sites, rank: int, trains: str) -> dict[str, tuple[int, ...]]:
    """The exact keys and shapes of what travels up, for the strict codec."""
    return {
        f"{name}.{part.name}": part.shape(site, rank)
        for name, site in sites.items()
        for part in TRAINED_TENSORS[trains]
    }


def trained_tensors(adapter: Adapter, trains: str, bases: Adapter | None) -> dict[str, Tensor]:
    """What training may change of an adapter, as it travels up.

    Args:
        frame: A and L, where cores are trained.
    """
    return {
        f"{name}.{part.name}": _taken(part, factors, bases[name] if bases else None).contiguous()
        for name, factors in adapter.items()
        for part in TRAINED_TENSORS[trains]
    }


def from_trained_tensors(found: Mapping[str, Tensor], trains: str, start: Adapter, bases: Adapter | None) -> Adapter:
    """Inverse of `trained_tensors`, at the sites of `start`, which what stays is taken from."""
    return {
        name: _put(
            [found[f"{name}.{part.name}"] for part in TRAINED_TENSORS[trains]], trains, bases[name] if bases else fixed
        )
        for name, fixed in start.items()
    }


def _taken(part: Part, factors: Factors, bases: Factors | None) -> Tensor:
    """One part of a site's factors; a core is C = Lᵀ B."""
    if bases is not None:
        return bases.b.T @ factors.b
    return factors.a if part is _A else factors.b


def _put(found: Sequence[Tensor], trains: str, fixed: Factors) -> Factors:
    """The factors of a site from its parts and what stays."""
    match trains:
        case "both":
            return Factors(*found)
        case "b":
            return Factors(fixed.a, found[0])
        case "cores":
            return Factors(fixed.a, fixed.b @ found[0])
    return Factors(found[0], fixed.b)  # a, split


class PartialLayout(Layout):
    """A layout of rows where a part alone of each site is trained, beside factors that are everybody's.

    The gradient of B is that of the whole adapter, and so is that of A. The columns of L are orthonormal, so that
    C = Lᵀ B, and the gradient of C is Lᵀ (∂/∂B) (Bałazy et al., 2024, arXiv:2405.17604; Singhal et al., 2025,
    arXiv:2502.15436).

    Attributes:
        fixed: A [1, r, in] and B, or L, [1, out, r] of every site, zero until `set_fixed`. Adapters of smaller rank lie
            between the first directions of it.
    """

    def __init__(self, sites: Sites, rank: int, trains: str, *, like: Tensor) -> None:
        self.trains, (self._part,) = trains, TRAINED_TENSORS[trains]
        super().__init__(sites, rank)
        self.fixed = {
            name: BatchedFactors(like.new_zeros(1, rank, site.inputs), like.new_zeros(1, site.outputs, rank))
            for name, site in sites.items()
        }

    def set_fixed(self, fixed: Adapter) -> None:
        """From now on what is trained lies between these factors, of this rank or a smaller one."""
        for name, stack in self.fixed.items():
            stack.a.zero_()
            stack.b.zero_()
            if name in fixed:
                a, b = fixed[name]
                stack.a[0, : len(a)], stack.b[0, :, : len(a)] = a, b

    def _widths(self, site: Site) -> tuple[int, ...]:
        return (prod(self._part.shape(site, self.rank)),)

    def from_parts(self, parts: Sequence[Tensor]) -> dict[str, BatchedFactors]:
        """Stacks of every site from what is trained of it [S, …], site after site."""
        return {name: self._stack(name, part) for name, part in zip(self.sites, parts, strict=True)}

    def _stack(self, name: str, part: Tensor) -> BatchedFactors:
        own = part.view(len(part), *self._part.shape(self.sites[name], self.rank))
        a, b = (factor.to(part.dtype) for factor in self.fixed[name])
        match self.trains:
            case "a" | "split":
                return BatchedFactors(own, b.expand(len(own), -1, -1))
            case "b":
                return BatchedFactors(a.expand(len(own), -1, -1), own)
        return BatchedFactors(a.expand(len(own), -1, -1), b @ own)

    def pack(self, adapter: Adapter | None) -> Tensor:
        """Row [D] of what is trained of an adapter; missing sites and ranks are zero."""
        given = adapter or {}
        return self._row({name: self._own(name, given[name]) for name in self.sites if name in given})

    def unpack(self, row: Tensor, like: Adapter) -> Adapter:
        """The adapter in row [D] with the sites, true ranks and fixed factors of `like`; on the CPU."""
        parts = dict(zip(self.sites, row.detach().cpu().split(self.widths), strict=True))
        return {name: self._whole(name, parts[name], factors) for name, factors in like.items()}

    def mask(self, like: Adapter) -> Tensor:
        """[D] bool: which numbers of a row are trained of an adapter with the sites and ranks of `like`."""
        sizes = {name: self._part.shape(self.sites[name], len(factors.a)) for name, factors in like.items()}
        return self._row({name: torch.ones(size) for name, size in sizes.items()}) != 0

    def _own(self, name: str, factors: Factors) -> Tensor:
        a, left = (factor[0] for factor in self.fixed[name])
        here, rank = Factors(*(factor.to(a) for factor in factors)), len(factors.a)
        return _taken(self._part, here, Factors(a[:rank], left[:, :rank]) if self.trains == "cores" else None)

    def _whole(self, name: str, part: Tensor, like: Factors) -> Factors:
        """The factors of a site, from its part of a row."""
        rank = len(like.a)
        size = self._part.shape(self.sites[name], rank)
        own = part.view(self._part.shape(self.sites[name], self.rank))[: size[0], : size[1]].clone()
        left = self.fixed[name].b[0, :, :rank].cpu()
        return _put([own], self.trains, Factors(like.a, left) if self.trains == "cores" else like)

    def _row(self, found: Mapping[str, Tensor]) -> Tensor:
        """Row [D] of parts of any rank by site, zero elsewhere."""
        row = torch.zeros(self.size) if not found else next(iter(found.values())).new_zeros(self.size)
        for name, place in zip(self.sites, row.split(self.widths), strict=True):
            if name in found:
                rows, columns = found[name].shape
                place.view(self._part.shape(self.sites[name], self.rank))[:rows, :columns] = found[name]
        return row


def trained_layout(sites: Sites, rank: int, trains: str, fixed: Adapter) -> Layout:
    """How what travels up of adapters of this rank lies in a row.

    Args:
        fixed: what holds the rest, where a part alone travels: the frame of cores, or the adapter that was sent.
    """
    if trains == "both":
        return Layout(sites, rank)
    layout = PartialLayout(sites, rank, trains, like=torch.empty(0))
    layout.set_fixed(fixed)
    return layout
