"""Trained and fixed parts of an adapter: names and shapes in messages, and positions in a row.

    both    A and B                                   <site>.lora_A, <site>.lora_B
    a       A; B is fixed                             <site>.lora_A
    b       B; A is fixed                             <site>.lora_B
    cores   C [r, r] of B = L C; A and L are fixed    <site>.core
    split   A and B; B stays on the device            <site>.lora_A

Fixed factors are the same for all devices that train from one adapter. They have no gradient, so that clipping,
noise and optimizer ignore them, and they are never uploaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors, Site, Sites
from models.lora.batched_lora import BatchedFactors, Layout


class TensorSpec(NamedTuple):
    """One uploaded tensor of a site."""

    name: str
    shape: Callable[[Site, int], tuple[int, ...]]
    """(site, rank) -> shape."""


_A = TensorSpec("lora_A", lambda site, rank: (rank, site.inputs))
_B = TensorSpec("lora_B", lambda site, rank: (site.outputs, rank))
_C = TensorSpec("core", lambda site, rank: (rank, rank))  # noqa: ARG005  # all sites have cores of one size

TRAINED_TENSORS: Mapping[str, tuple[TensorSpec, ...]] = {
    "both": (_A, _B),
    "a": (_A,),
    "b": (_B,),
    "cores": (_C,),
    "split": (_A,),
}


def trained_shapes(sites: Sites, rank: int, trainable: str) -> dict[str, tuple[int, ...]]:
    """Return the exact keys and shapes of an upload, for the strict codec.

    Args:
        sites: dimensions by name.
        rank: r, at every site.
        trainable: key of `TRAINED_TENSORS`.
    """
    return dict(_trained_shapes(tuple(sites.items()), rank, trainable))


@lru_cache(maxsize=16)
def _trained_shapes(sites: tuple[tuple[str, Site], ...], rank: int, trainable: str) -> dict[str, tuple[int, ...]]:
    """Compute `trained_shapes`, cached since the devices of a fleet train the same shapes."""
    return {
        f"{name}.{spec.name}": spec.shape(site, rank) for name, site in sites for spec in TRAINED_TENSORS[trainable]
    }


def trained_tensors(adapter: Adapter, trainable: str, bases: Adapter | None) -> dict[str, Tensor]:
    """Return the trained tensors of an adapter, as they are uploaded.

    Args:
        adapter: A [r, in] and B [out, r] of every site.
        trainable: key of `TRAINED_TENSORS`.
        bases: A [r, in] and L [out, r] if cores are trained, else None.

    Returns:
        Tensors by name, with the shapes of `trained_shapes`.
    """
    return {
        f"{name}.{spec.name}": _trained_part(spec, factors, bases[name] if bases else None).contiguous()
        for name, factors in adapter.items()
        for spec in TRAINED_TENSORS[trainable]
    }


def from_trained_tensors(
    tensors: Mapping[str, Tensor], trainable: str, start: Adapter, bases: Adapter | None
) -> Adapter:
    """Invert `trained_tensors` at the sites of `start`, which provides the fixed factors.

    Args:
        tensors: trained tensors by name, with the shapes of `trained_shapes`.
        trainable: key of `TRAINED_TENSORS`.
        start: adapter that training started from.
        bases: A [r, in] and L [out, r] if cores are trained, else None.

    Returns:
        A [r, in] and B [out, r] per site.
    """
    return {
        name: _combine(
            [tensors[f"{name}.{spec.name}"] for spec in TRAINED_TENSORS[trainable]],
            trainable,
            bases[name] if bases else fixed,
        )
        for name, fixed in start.items()
    }


def _trained_part(spec: TensorSpec, factors: Factors, bases: Factors | None) -> Tensor:
    """Return one trained tensor of a site; a core is C = Lᵀ B."""
    if bases is not None:
        return bases.b.T @ factors.b
    return factors.a if spec is _A else factors.b


def _combine(trained: Sequence[Tensor], trainable: str, fixed: Factors) -> Factors:
    """Return the factors of a site from its trained tensors and its fixed factors."""
    match trainable:
        case "both":
            return Factors(*trained)
        case "b":
            return Factors(fixed.a, trained[0])
        case "cores":
            return Factors(fixed.a, fixed.b @ trained[0])
    return Factors(trained[0], fixed.b)  # a, split


class PartialLayout(Layout):
    """A layout whose rows hold only the trained tensor of each site, with fixed factors shared by all rows.

    The gradient of B is that of the whole adapter, and so is that of A. The columns of L are orthonormal, so that
    C = Lᵀ B, and the gradient of C is Lᵀ (∂/∂B) (Bałazy et al., 2024, arXiv:2405.17604; Singhal et al., 2025,
    arXiv:2502.15436).

    Attributes:
        fixed: A [1, r, in] and B, or L, [1, out, r] of every site; zero until `set_fixed`. Adapters of smaller rank use
            the first directions.
    """

    def __init__(self, sites: Sites, rank: int, trainable: str, *, like: Tensor) -> None:
        self.trainable, (self._spec,) = trainable, TRAINED_TENSORS[trainable]
        super().__init__(sites, rank)
        self.fixed = {
            name: BatchedFactors(like.new_zeros(1, rank, site.inputs), like.new_zeros(1, site.outputs, rank))
            for name, site in sites.items()
        }

    def set_fixed(self, fixed: Adapter) -> None:
        """Set the fixed factors: A [r', in] and B, or L, [out, r'] per site, with r' at most this layout's rank."""
        for name, batched in self.fixed.items():
            batched.a.zero_()
            batched.b.zero_()
            if name in fixed:
                a, b = fixed[name]
                batched.a[0, : len(a)], batched.b[0, :, : len(a)] = a, b

    def _widths(self, site: Site) -> tuple[int, ...]:
        return (prod(self._spec.shape(site, self.rank)),)

    def from_parts(self, parts: Sequence[Tensor]) -> dict[str, BatchedFactors]:
        """Build batched factors of every site from its trained tensor [S, …], in site order."""
        return {name: self._factors(name, part) for name, part in zip(self.sites, parts, strict=True)}

    def _factors(self, name: str, part: Tensor) -> BatchedFactors:
        trained = part.view(len(part), *self._spec.shape(self.sites[name], self.rank))
        a, b = (factor.to(part.dtype) for factor in self.fixed[name])
        match self.trainable:
            case "a" | "split":
                return BatchedFactors(trained, b.expand(len(trained), -1, -1))
            case "b":
                return BatchedFactors(a.expand(len(trained), -1, -1), trained)
        return BatchedFactors(a.expand(len(trained), -1, -1), b @ trained)

    def pack(self, adapter: Adapter | None) -> Tensor:
        """Return the row [D] of an adapter's trained tensors; missing sites and ranks are zero."""
        factors = adapter or {}
        return self._row({name: self._pack_site(name, factors[name]) for name in self.sites if name in factors})

    def unpack(self, row: Tensor, like: Adapter) -> Adapter:
        """Return the adapter in row [D] with the sites, ranks and fixed factors of `like`; on the CPU."""
        parts = dict(zip(self.sites, row.detach().cpu().split(self.widths), strict=True))
        return {name: self._unpack_site(name, parts[name], factors) for name, factors in like.items()}

    def mask(self, like: Adapter) -> Tensor:
        """Return [D] bool: the numbers of a row that are trained for an adapter with the sites and ranks of `like`."""
        sizes = {name: self._spec.shape(self.sites[name], len(factors.a)) for name, factors in like.items()}
        return self._row({name: torch.ones(size) for name, size in sizes.items()}) != 0

    def _pack_site(self, name: str, factors: Factors) -> Tensor:
        a, frame = (factor[0] for factor in self.fixed[name])
        moved, rank = Factors(*(factor.to(a) for factor in factors)), len(factors.a)
        bases = Factors(a[:rank], frame[:, :rank]) if self.trainable == "cores" else None
        return _trained_part(self._spec, moved, bases)

    def _unpack_site(self, name: str, part: Tensor, like: Factors) -> Factors:
        """Return the factors of a site from its part of a row."""
        rank = len(like.a)
        size = self._spec.shape(self.sites[name], rank)
        trained = part.view(self._spec.shape(self.sites[name], self.rank))[: size[0], : size[1]].clone()
        frame = self.fixed[name].b[0, :, :rank].cpu()
        return _combine([trained], self.trainable, Factors(like.a, frame) if self.trainable == "cores" else like)

    def _row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a row [D] from trained tensors of any rank by site, zero elsewhere."""
        row = torch.zeros(self.size) if not tensors else next(iter(tensors.values())).new_zeros(self.size)
        for name, part in zip(self.sites, row.split(self.widths), strict=True):
            if name in tensors:
                rows, columns = tensors[name].shape
                part.view(self._spec.shape(self.sites[name], self.rank))[:rows, :columns] = tensors[name]
        return row


def trained_layout(sites: Sites, rank: int, trainable: str, fixed: Adapter) -> Layout:
    """Return the layout of uploads of adapters of one rank.

    Args:
        sites: dimensions by name.
        rank: r.
        trainable: key of `TRAINED_TENSORS`.
        fixed: provides the fixed factors of a partial layout: the LoRA-XS bases, or the adapter that was sent.
    """
    if trainable == "both":
        return Layout(sites, rank)
    layout = PartialLayout(sites, rank, trainable, like=torch.empty(0))
    layout.set_fixed(fixed)
    return layout
