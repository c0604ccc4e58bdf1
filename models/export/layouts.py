"""Export adapters for other tools: in diffusers' layout (peft keys) and in kohya's (`models.families.kohya`).

The scale is folded into B, so α = rank. All sites are zero-padded to the largest rank, because diffusers loses the α of
individual attention layers in kohya's layout. Files are byte-for-byte reproducible.
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
from models.families.family import Family
from models.families.kohya import KOHYA_PREFIX, PartFactors, merge_parts, swap_halves
from models.lora.adapter import Adapter, Sites, rank

LAYOUTS = ("diffusers", "kohya")


def diffusers_keys(adapter: Adapter, sites: Sites, family: Family) -> dict[str, Tensor]:
    """Return the tensors that `pipe.load_lora_weights` reads.

    Keys are `unet.<site>.lora_A.weight` and `….lora_B.weight`, or `transformer.…`.

    Args:
        adapter: A [r, in] and B [out, r] of every site.
        sites: dimensions by name.
        family: of the base.
    """
    tensors = {}
    for name, (down, up) in _layers(adapter, sites):
        tensors[f"{family.network}.{name}.lora_A.weight"] = down
        tensors[f"{family.network}.{name}.lora_B.weight"] = up
    return tensors


def kohya_keys(adapter: Adapter, sites: Sites, family: Family) -> dict[str, Tensor]:
    """Return the tensors of kohya's layout.

    Keys are `lora_unet_<module, dots as underscores>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Args:
        adapter: A [r, in] and B [out, r] of every site.
        sites: dimensions by name.
        family: of the base.

    Raises:
        AntherError: no tool reads this layout for the family.
    """
    if family.kohya is None:
        raise AntherError(f"layout=kohya: no tool reads it for {family.name}: export with layout=diffusers")
    modules: dict[str, list[PartFactors]] = {}
    for name, (down, up) in _layers(adapter, sites):
        part = family.kohya.fused_part(name)
        up = swap_halves(name, sites[name], up) if family.kohya.names else up
        modules.setdefault(part.module, []).append(PartFactors(part.part, part.parts, down, up))
    tensors = {}
    for module, parts in modules.items():
        down, up = merge_parts(parts)
        stem = KOHYA_PREFIX + module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _layers(adapter: Adapter, sites: Sites) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield A and B per site as layer weights; for a convolution A is [r, in, h, w] and B [out, r, 1, 1]."""
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
    """Write an adapter as one safetensors file, atomically.

    Args:
        adapter: A [r, in] and B [out, r] of every site.
        path: path of the file.
        family: family of the base.
        sites: dimensions by name.
        layout: one of `LAYOUTS`.
        metadata: strings to store in the file.

    Raises:
        AntherError: no tool reads this layout for the family.
    """
    keys = {"diffusers": diffusers_keys, "kohya": kohya_keys}[layout]
    tensors = keys(adapter, sites, family)
    header = {"format": "pt", **(metadata or {})}
    if layout == "kohya":
        header |= _network_metadata(tensors, family)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_sort_metadata(save(tensors, header)))
    partial.replace(path)


def _network_metadata(tensors: Mapping[str, Tensor], family: Family) -> dict[str, str]:
    """Return sd-scripts' metadata of a network; as in its own tools, `Dynamic` if ranks differ."""
    assert family.kohya is not None, "the family has keys in this layout"
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_down.weight")}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": family.kohya.network_module, "ss_network_dim": dim, "ss_network_alpha": dim}


def _sort_metadata(content: bytes) -> bytes:
    """Sort the metadata in safetensors bytes: the library writes them in a different order each time."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]
