"""Match a LoRA file of another tool with the layers of a base, and return it as an adapter.

Layers that the original networks merge, such as queries, keys and values, are split into their parts: each gets the
rows of B that belong to it, and all share A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import AntherError, shorten
from models.export.base_outline import AdaptedBase
from models.export.lora_file import LoraModule, read_lora_file
from models.families.kohya import KOHYA_PREFIX, FusedPart, swap_halves
from models.families.ldm_names import ldm_names
from models.lora.adapter import Adapter, Factors, Site, rank

_PREFIXES = re.compile(r"^(base_model\.model\.|unet\.|transformer\.|diffusion_model\.|lora_transformer_|lycoris_)+")


class ImportedAdapter(NamedTuple):
    """An adapter read from a file."""

    adapter: Adapter
    """A and B of equal rank at every layer that the file adapts, in the network's order."""
    contents: str | None
    """Its contents if Anther wrote it, a key of `models.export.adapter_files.CONTENTS`."""
    notes: tuple[str, ...]
    """Lines for the owner about ignored parts."""


class _Target(NamedTuple):
    site: str
    part: FusedPart
    original: bool
    """Whether the name is of the original network, where some halves have the opposite order."""


def read_adapter(file: Path, base: AdaptedBase, *, any_base: bool = False) -> ImportedAdapter:
    """Read a LoRA in diffusers' or kohya's layout for this base.

    Args:
        file: safetensors file.
        base: all layers of the base.
        any_base: also accept a file that Anther wrote for another base, if it has the same layers.

    Raises:
        AntherError: the file can't be read, or is for another kind of base.
    """
    content = read_lora_file(file)
    expected = content.metadata.get("anther_base")
    if expected and expected != base.hash and not any_base:
        raise AntherError(
            f"{file}: belongs to base {shorten(expected, 12)}, this one is {base.hash[:12]}: name its own with --base, "
            "or add --any-base if both have the same layers"
        )
    targets = _targets(base)
    named = {stem: targets.get(_key(stem)) for stem in content.modules}
    if unknown := [stem for stem, found in named.items() if found is None]:
        raise AntherError(
            f"{file}: {len(unknown)} of its {len(named)} layers are not in this {base.family.name} base, such as "
            f"{shorten(unknown[0])}: name the base that it was made for with --base"
        )
    factors: dict[str, list[Factors]] = {}
    for stem, found in named.items():
        for target in found or ():
            factors.setdefault(target.site, []).append(_part(file, stem, content.modules[stem], target, base))
    if twice := next((site for site, parts in factors.items() if len(parts) > 1), None):
        raise AntherError(f"{file}: names the layer {twice} twice: keep the layout of one tool")
    notes: tuple[str, ...] = ()
    if content.text_encoder_tensors:
        notes = (f"ignored {content.text_encoder_tensors} tensors of text encoders: only the network is adapted",)
    adapter = {site: factors[site][0] for site in base.sites if site in factors}
    return ImportedAdapter(pad_ranks(adapter, rank(adapter)), content.metadata.get("anther_contents"), notes)


def pad_ranks(adapter: Adapter, target: int) -> Adapter:
    """Pad every site with zeros to this rank, or leave it if it is larger."""
    return {
        site: Factors(F.pad(f.a, (0, 0, 0, max(0, target - len(f.a)))), F.pad(f.b, (0, max(0, target - len(f.a)))))
        for site, f in adapter.items()
    }


def _key(stem: str) -> str:
    """Return a layer's name without prefix, with underscores, as in kohya's layout."""
    stem = stem.removeprefix(KOHYA_PREFIX)
    stem = _PREFIXES.sub("", stem).replace(".processor.to_", ".to_").replace(".", "_")
    return re.sub(r"_to_out$", "_to_out_0", stem)


def _targets(base: AdaptedBase) -> Mapping[str, list[_Target]]:
    """Return the layers that each name in a file means: diffusers' own names and those of the original network."""
    targets = {name.replace(".", "_"): [_Target(name, FusedPart(name), original=False)] for name in base.sites}
    kohya = base.family.kohya
    if kohya is not None and kohya.names:
        originals: dict[str, list[_Target]] = {}
        for name in base.sites:
            if (part := kohya.find_part(name)) is not None:
                originals.setdefault(part.module.replace(".", "_"), []).append(_Target(name, part, original=True))
        return {**targets, **originals}
    layers = base.config.get("layers_per_block")
    if base.family.network == "unet" and isinstance(layers, int):
        for name, original in ldm_names(base.sites, layers).items():
            targets.setdefault(original.replace(".", "_"), []).append(_Target(name, FusedPart(name), original=False))
    return targets


def _part(file: Path, stem: str, module: LoraModule, target: _Target, base: AdaptedBase) -> Factors:
    """Return the factors of one layer from those of its module."""
    site, parts = base.sites[target.site], target.part.parts
    rows = site.outputs // parts[target.part.part] * sum(parts)
    if (module.down.shape[1], len(module.up)) != (site.inputs, rows) or not _is_kernel(module, site):
        down, up = (list(shape) for shape in module.shapes)
        raise AntherError(
            f"{file}: {shorten(stem)} has factors of shape {down} and {up}, but the base's layer has {site.inputs} "
            f"inputs and {rows} outputs: name the base that it was made for with --base"
        )
    start = site.outputs // parts[target.part.part] * sum(parts[: target.part.part])
    b = module.up[start : start + site.outputs]
    if target.original:
        b = swap_halves(target.site, site, b)
    return _used(module.down, b)


def _is_kernel(module: LoraModule, site: Site) -> bool:
    """Return whether A has the layer's kernel; a 1 × 1 kernel may be left out."""
    kernel = module.shapes[0][2:]
    return kernel == site.kernel or ((not kernel or kernel == (1, 1)) and site.kernel in ((), (1, 1)))


def _used(a: Tensor, b: Tensor) -> Factors:
    """Drop the directions of other parts, where B is zero; at least one remains."""
    used = b.any(0)
    used[0] |= not used.any()
    return Factors(a[used].clone(), torch.clone(b[:, used]))
