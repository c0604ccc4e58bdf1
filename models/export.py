"""Adapters as other tools read them: diffusers (peft keys) and kohya (ComfyUI, stable-diffusion.cpp).

An export is self-contained: concatenate shared and personal first. The scale is folded into B, so α = rank. All sites
get the largest rank, filled up with zeros: diffusers loses the α of single attention layers in kohya's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from conf.errors import AntherError
from models.adapter import Adapter, Sites, rank
from models.families.family import Family


def diffusers_keys(adapter: Adapter, sites: Sites, family: Family) -> dict[str, Tensor]:
    """`unet.<site>.lora_A.weight`, `….lora_B.weight`, or `transformer.…`: what `pipe.load_lora_weights` reads."""
    tensors = {}
    for name, (down, up) in _layers(adapter, sites):
        tensors[f"{family.network}.{name}.lora_A.weight"] = down
        tensors[f"{family.network}.{name}.lora_B.weight"] = up
    return tensors


def kohya_keys(adapter: Adapter, sites: Sites, family: Family) -> dict[str, Tensor]:
    """`lora_unet_<site, dots as underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`, or `lora_transformer_…`.

    Raises:
        AntherError: nobody reads such keys of this family.
    """
    if family.kohya is None:
        raise AntherError(f"layout=kohya: no tool reads it for {family.name}: export with layout=diffusers")
    tensors = {}
    for name, (down, up) in _layers(adapter, sites):
        stem = family.kohya + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _layers(adapter: Adapter, sites: Sites) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """A and B of each site as layers: at a convolution A [r, in, h, w] has its kernel, and B [out, r, 1, 1] none."""
    largest = rank(adapter)
    for name, (a, b) in adapter.items():
        missing = largest - len(a)
        down, up = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        if kernel := sites[name].kernel:
            down, up = down.unflatten(1, (-1, *kernel)), up[:, :, None, None]
        yield name, (down.contiguous(), up.contiguous())


def export(
    adapter: Adapter,
    path: Path,
    *,
    family: Family,
    sites: Sites,
    layout: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter of these sites as one safetensors file; it appears under its name only when complete."""
    keys = {"diffusers": diffusers_keys, "kohya": kohya_keys}[layout]
    notes = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank(adapter))}
    content = save(keys(adapter, sites, family), metadata={**notes, **(metadata or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_bytes(content)
    scratch.replace(path)
