"""LoRA adapters as plain tensors.

At a site with weight W [out, in] an adapter adds the product B A, with A [r, in] and B [out, r]. The scale α/r is
folded into B, so that adapters of different rank can be compared, added and concatenated (Hu et al., 2021,
arXiv:2106.09685, §4.1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Site(NamedTuple):
    """Dimensions of a layer that can carry an adapter: linear, or a convolution seen as a matrix product."""

    inputs: int
    """For a convolution: channels · height · width of its kernel."""
    outputs: int
    kernel: tuple[int, ...] = ()
    """(height, width) of a convolution's kernel; empty for a linear layer."""


class Factors(NamedTuple):
    """A [r, in] and B [out, r] of one site."""

    a: Tensor
    b: Tensor


Sites = Mapping[str, Site]
"""Dimensions of layers, by their names in the network."""

Adapter = Mapping[str, Factors]
"""A [r, in] and B [out, r] by the name of the site; r may differ between sites."""


def rank(adapter: Adapter) -> int:
    """Return the largest rank over sites; 0 for an adapter without sites."""
    return max((factors.a.shape[0] for factors in adapter.values()), default=0)


def init_adapter(sites: Sites, rank: int, seed: int) -> Adapter:
    """Initialize A with entries N(0, 1/in) and B = 0, so that the product is zero; equal for equal seeds.

    Args:
        sites: dimensions by name.
        rank: r.
        seed: seed of the generator.

    Returns:
        A [r, in] and B [out, r] per site.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, site.inputs, generator=generator) / site.inputs**0.5,
            torch.zeros(site.outputs, rank),
        )
        for name, site in sites.items()
    }


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """Return the adapter whose product is the sum of the given products.

    Args:
        adapters: adapter k has A [r_k, in] and B [out, r_k].

    Returns:
        A [Σ r_k, in] and B [out, Σ r_k] per site, over the adapters that have the site.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    present = {name: [adapter[name] for adapter in adapters if name in adapter] for name in names}
    return {
        name: Factors(torch.cat([f.a for f in parts]), torch.cat([f.b for f in parts], dim=1))
        for name, parts in present.items()
    }


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Return the adapter whose product is multiplied by a factor."""
    return {name: Factors(f.a, factor * f.b) for name, f in adapter.items()}


def guides_of(adapters: Sequence[Adapter], strength: float) -> list[Adapter]:
    """Return adapters for guidance's unconditional prediction: the last one, which is personal, with less strength.

    Args:
        adapters: the shared adapter, and the personal one if there is any.
        strength: factor of the personal one; 0 leaves it out.
    """
    shared, personal = adapters[:1], adapters[1:]
    return [*shared, *(scale(adapter, strength) for adapter in personal if strength)]


def select_sites(adapter: Adapter, sites: Collection[str]) -> Adapter:
    """Return the part of an adapter at these sites."""
    return {name: factors for name, factors in adapter.items() if name in sites}


def first_directions(adapter: Adapter, rank: int) -> Adapter:
    """Return the first directions of every site.

    Args:
        adapter: A [r, in] and B [out, r] per site.
        rank: number n of directions, or all if there are fewer.

    Returns:
        A [n, in] and B [out, n].
    """
    return {
        name: factors if factors.a.shape[0] <= rank else Factors(factors.a[:rank], factors.b[:, :rank])
        for name, factors in adapter.items()
    }


def split_rank(adapter: Adapter, rank: int) -> tuple[Adapter, Adapter]:
    """Split every site into its first directions and the remaining ones.

    Args:
        adapter: A [r, in] and B [out, r] per site.
        rank: number n of directions in the first part, or all if there are fewer.

    Returns:
        A [n, in] and B [out, n]; A [r − n, in] and B [out, r − n].
    """
    tail = {name: Factors(f.a[rank:], f.b[:, rank:]) for name, f in adapter.items()}
    return first_directions(adapter, rank), tail


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Flatten to the names of messages and files: `<site>.lora_A` [r, in] and `<site>.lora_B` [out, r]."""
    tensors = {}
    for name, factors in adapter.items():
        tensors[f"{name}.lora_A"] = factors.a.contiguous()
        tensors[f"{name}.lora_B"] = factors.b.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Adapter:
    """Invert `to_tensors`.

    Args:
        tensors: `<site>.lora_A` [r, in] and `<site>.lora_B` [out, r]. They must come in pairs, as checked by
            `protocol.tensor_codec`; other names are ignored.
    """
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    return {name: Factors(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}


def adapter_shapes(sites: Sites, rank: int, *, with_bases: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the exact keys and shapes of an adapter, for the strict codec.

    Args:
        sites: dimensions by name.
        rank: r, at every site; −1 if the codec accepts any rank.
        with_bases: include the `<site>.frame` tensors of LoRA-XS (`models.lora.lora_xs`).
    """
    expected: dict[str, tuple[int, ...]] = {}
    for name, site in sites.items():
        expected[f"{name}.lora_A"] = (rank, site.inputs)
        expected[f"{name}.lora_B"] = (site.outputs, rank)
        if with_bases:
            expected[f"{name}.frame"] = (site.outputs, rank)
    return expected
