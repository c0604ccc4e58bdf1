"""Small networks of every family that tools read, and the places of their layers in the original networks.

The places come from the tool's own tables, so that they are independent of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from bench.lib import tiny_pipelines
from models.diffusion.sites import adaptable
from models.families.checkpoint import recognize
from models.families.family import Family
from models.lora.adapter import Adapter, Sites

PIPELINES = ("stable_diffusion", "stable_diffusion_2", "sdxl", "flux", "flux_schnell", "sd3")
_SD3 = {"attention_head_dim": 64, "caption_projection_dim": 128}  # the original's width is 64 · depth


@dataclass(frozen=True, kw_only=True)
class SmallNetwork:
    """A network of random weights."""

    name: str
    family: Family
    config: Mapping[str, Any]
    sites: Sites

    @property
    def original_config(self) -> dict[str, Any]:
        """Configuration with the keys of the original networks, as their tables read it."""
        config = self.config
        if self.family.name == "sd3":
            return {"depth": config["num_layers"]}
        if self.family.name == "flux":
            width = config["attention_head_dim"] * config["num_attention_heads"]
            singles = config["num_single_layers"]
            return {"depth": config["num_layers"], "depth_single_blocks": singles, "hidden_size": width}
        levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
        depths = config.get("transformer_layers_per_block") or 1
        depths = [depths] * levels if isinstance(depths, int) else list(depths)
        down = [d * ("CrossAttn" in kind) for d, kind in zip(depths, config["down_block_types"], strict=True)]
        up = [d * ("CrossAttn" in kind) for d, kind in zip(depths[::-1], config["up_block_types"], strict=True)]
        return {
            "num_res_blocks": [layers] * levels,
            "channel_mult": [1] * levels,
            "transformer_depth": [depth for depth in down for _ in range(layers)],
            "transformer_depth_output": [depth for depth in up[::-1] for _ in range(layers + 1)],
            "transformer_depth_middle": depths[-1],
        }


def small_network(name: str, folder: Path) -> SmallNetwork:
    """Return the network of a tiny pipeline; SD3's is wider, because its original fixes the width by the depth.

    Args:
        name: one of `PIPELINES`.
        folder: scratch folder.
    """
    checkpoint = recognize(tiny_pipelines.save(name, folder))
    config = checkpoint.config(checkpoint.family.network) | (_SD3 if name == "sd3" else {})
    with torch.device("meta"):
        network = getattr(diffusers, checkpoint.family.kind).from_config(config)
    return SmallNetwork(name=name, family=checkpoint.family, config=config, sites=adaptable(network))


class Place(NamedTuple):
    """Rows of an original weight that belong to a diffusers layer."""

    key: str
    rows: tuple[int, int] | None = None  # first and number; None: all
    convert: Callable[[Tensor], Tensor] | None = None


def places(utils: Any, network: SmallNetwork) -> dict[str, Place]:
    """Return the place of each layer, from a tool's tables.

    Args:
        utils: ComfyUI's module `utils`, or Forge's copy of it.
        network: the network.
    """
    table = {"sd3": "mmdit_to_diffusers", "flux": "flux_to_diffusers"}.get(network.family.name, "unet_to_diffusers")
    found = {}
    for name, entry in getattr(utils, table)(network.original_config).items():
        site = name.removesuffix(".weight")
        if name.endswith(".weight") and site in network.sites:
            key, offset, convert = (*entry, None)[:3] if isinstance(entry, tuple) else (entry, None, None)
            found[site] = Place(key, offset and offset[1:], convert)
    return found


def original_weights(adapter: Adapter, network: SmallNetwork, where: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the products of an adapter as changes of the original weights.

    Args:
        adapter: A and B of every site.
        network: its network.
        where: result of `places`.
    """
    heights: dict[str, int] = {}
    for site, place in where.items():
        end = sum(place.rows) if place.rows else network.sites[site].outputs
        heights[place.key] = max(end, heights.get(place.key, 0))
    weights: dict[str, Tensor] = {}
    for site, place in where.items():
        dimensions = network.sites[site]
        product = adapter[site].b.double() @ adapter[site].a.double()
        product = place.convert(product) if place.convert else product
        shape = (heights[place.key], dimensions.inputs)
        weight = weights.setdefault(place.key, torch.zeros(shape, dtype=torch.float64))
        start, rows = place.rows or (0, len(product))
        weight[start : start + rows] = product
    kernels = {place.key: network.sites[site].kernel for site, place in where.items()}
    return {key: w.unflatten(1, (-1, *kernels[key])) if kernels[key] else w for key, w in weights.items()}
