"""Layer names in kohya's layout, which sd-scripts, ComfyUI, A1111 and Forge read.

UNets keep diffusers' names. SD3 and Flux use the names of the original networks, which merge several diffusers layers
into one: queries, keys and values are stacked in a single weight. Adapters of such layers are merged into one with
stacked A and block-diagonal B, each block in the rows of its part. The product is bit-identical.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Site

KOHYA_PREFIX = "lora_unet_"


class FusedPart(NamedTuple):
    """Position of a diffusers layer in the original network."""

    module: str
    part: int = 0
    """Index of the layer's rows among the module's parts."""
    parts: tuple[int, ...] = (1,)
    """Relative number of rows of each part."""


class PartFactors(NamedTuple):
    """Adapter of one diffusers layer, as a part of a module."""

    part: int
    parts: tuple[int, ...]
    down: Tensor  # [r, in], or [r, in, h, w] for a convolution
    up: Tensor  # [out, r], or [out, r, 1, 1] for a convolution


@dataclass(frozen=True, kw_only=True)
class KohyaFormat:
    """Names of a family's layers in sd-scripts, and the layers that it reads."""

    network_module: str
    """sd-scripts module that reads the file."""
    names: tuple[tuple[str, FusedPart], ...] = ()
    """(regular expression on diffusers' names, part with its groups); the first match wins. Empty: names are kept."""
    read: str = ".*"
    """Regular expression on diffusers' names of the layers that sd-scripts reads; it silently drops the others."""

    def fused_part(self, name: str) -> FusedPart:
        """Return the position of a layer in the original network.

        Raises:
            AntherError: the family's network has no such layer.
        """
        if (part := self.find_part(name)) is None:
            raise AntherError(f"{name}: has no name in kohya's layout: export with layout=diffusers")
        return part

    def find_part(self, name: str) -> FusedPart | None:
        """Return the position of a layer in the original network; None if it has none."""
        if not self.names:
            return FusedPart(name)
        for pattern, part in self.names:
            if match := re.fullmatch(pattern, name):
                return part._replace(module=match.expand(part.module))
        return None

    def ignored(self, sites: Iterable[str]) -> list[str]:
        """Return the sites that sd-scripts ignores; ComfyUI reads them."""
        return [name for name in sites if not re.fullmatch(self.read, name)]


def merge_parts(factors: Iterable[PartFactors]) -> tuple[Tensor, Tensor]:
    """Merge A and B of a module's parts into [Σ r, in] and [out, Σ r]; rows of other parts are zero."""
    factors = sorted(factors, key=lambda part: part.part)
    if len(factors) == len(factors[0].parts) == 1:
        return factors[0].down, factors[0].up
    parts = factors[0].parts
    unit = len(factors[0].up) // parts[factors[0].part]
    down = torch.cat([part.down for part in factors])
    up = down.new_zeros(unit * sum(parts), len(down))
    column = 0
    for part in factors:
        row, rank = unit * sum(parts[: part.part]), len(part.down)
        up[row : row + len(part.up), column : column + rank] = part.up
        column += rank
    return down, up


def swap_halves(name: str, site: Site, up: Tensor) -> Tensor:
    """Swap the halves of B for a layer whose halves have the opposite order in the original network.

    The last modulation of a transformer outputs (scale, shift) in diffusers and (shift, scale) in SD3 and Flux. It is
    the only layer with twice as many outputs as inputs.

    Args:
        name: diffusers' layer name.
        site: its dimensions.
        up: B [out, r].
    """
    if re.fullmatch(r"norm_out\.linear|.*\.norm1_context\.linear", name) and site.outputs == 2 * site.inputs:
        return torch.cat(up.chunk(2)[::-1])
    return up


def map_qkv(pattern: str, module: str, further_rows: int = 0) -> tuple[tuple[str, FusedPart], ...]:
    """Map the names of queries, keys and values to one merged module.

    Args:
        pattern: layer name, with %s in place of q, k and v.
        module: name of the merged module, with the pattern's groups.
        further_rows: rows below them in the merged weight, relative to the rows of each.
    """
    parts = (1, 1, 1, further_rows) if further_rows else (1, 1, 1)
    return tuple((pattern % letter, FusedPart(module, part, parts)) for part, letter in enumerate("qkv"))


def map_names(names: Mapping[str, str]) -> tuple[tuple[str, FusedPart], ...]:
    """Map the names of layers that remain separate modules."""
    return tuple((pattern, FusedPart(module)) for pattern, module in names.items())


UNET_KOHYA = KohyaFormat(network_module="networks.lora", read=r"(down_blocks|mid_block|up_blocks)\..*")
