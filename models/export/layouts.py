"""Adapters as other tools read them: in diffusers' layout (peft keys) and in kohya's (`models.export.kohya`).

The scale is folded into B, so α = rank. All sites get the largest rank, filled up with zeros: diffusers loses the α of
single attention layers in kohya's layout. A file is the same, byte for byte, whenever it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from common.errors import AntherError
from models.export.kohya import KOHYA_PREFIX, PartFactors, merge_parts, swap_halves
from models.families.family import Family
from models.lora.adapter import Adapter, Sites, rank

LAYOUTS = ("diffusers", "kohya")


def diffusers_keys(adapter: Adapter, sites: Sites, family: Family) -> dict[str, Tensor]:
    """`unet.<site>.lora_A.weight`, `….lora_B.weight`, or `transformer.…`: what `pipe.load_lora_weights` reads."""
    tensors = {}
    for name, (down, up) in _layers(adapter, sites):
        tensors[f"{family.network}.{name}.lora_A.weight"] = down
        tensors[f"{family.network}.{name}.lora_B.weight"] = up
    return tensors


def kohya_keys(adapter: Adapter, sites: Sites, family: Family) -> dict[str, Tensor]:
    """`lora_unet_<module, dots as underscores>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Raises:
        AntherError: no tool reads such keys of this family.
    """
    if family.kohya is None:
        raise AntherError(f"layout=kohya: no tool reads it for {family.name}: export with layout=diffusers")
    modules: dict[str, list[PartFactors]] = {}
    for name, (down, up) in _layers(adapter, sites):
        place = family.kohya.fused_part(name)
        up = swap_halves(name, sites[name], up) if family.kohya.names else up
        modules.setdefault(place.module, []).append(PartFactors(place.part, place.parts, down, up))
    tensors = {}
    for module, pieces in modules.items():
        down, up = merge_parts(pieces)
        stem = KOHYA_PREFIX + module.replace(".", "_")
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
    tensors = keys(adapter, sites, family)
    notes = {"format": "pt", **(metadata or {})}
    if layout == "kohya":
        notes |= _network_of(tensors, family)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_bytes(_in_order(save(tensors, notes)))
    scratch.replace(path)


def _network_of(tensors: Mapping[str, Tensor], family: Family) -> dict[str, str]:
    """What sd-scripts writes of a network: `Dynamic` where its modules' ranks differ, as its own tools have it."""
    assert family.kohya is not None, "it has keys in this layout"
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_down.weight")}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": family.kohya.network_module, "ss_network_dim": dim, "ss_network_alpha": dim}


def _in_order(content: bytes) -> bytes:
    """Safetensors bytes with their metadata sorted: the library writes them in another order each time."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]
