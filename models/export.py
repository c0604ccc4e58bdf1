"""Adapters as other tools read them: diffusers (peft keys) and kohya (ComfyUI, stable-diffusion.cpp).

An export is self-contained: concatenate shared and personal first. The scale is folded into B, so α = rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from models.adapter import Adapter, rank


def diffusers_keys(adapter: Adapter) -> dict[str, Tensor]:
    """`unet.<site>.lora_A.weight`, `….lora_B.weight`: what `pipe.load_lora_weights` reads."""
    tensors = {}
    for name, factors in adapter.items():
        tensors[f"unet.{name}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = factors.b.contiguous()
    return tensors


def kohya_keys(adapter: Adapter) -> dict[str, Tensor]:
    """`lora_unet_<site, dots as underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    tensors = {}
    for name, factors in adapter.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = factors.a.contiguous()
        tensors[f"{stem}.lora_up.weight"] = factors.b.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(factors.a.shape[0]))
    return tensors


def export(
    adapter: Adapter, path: Path, *, layout: str = "diffusers", metadata: Mapping[str, str] | None = None
) -> None:
    """Write an adapter as one safetensors file; it appears under its name only when complete."""
    keys = {"diffusers": diffusers_keys, "kohya": kohya_keys}[layout]
    notes = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank(adapter))}
    content = save(keys(adapter), metadata={**notes, **(metadata or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_bytes(content)
    scratch.replace(path)
