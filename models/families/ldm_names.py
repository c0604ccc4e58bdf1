"""Layer names of UNets in the original implementation of latent diffusion, which many LoRAs for SDXL use.

It numbers all blocks of a side in one list. A level of n resnets fills n + 1 places: its resnets and a downsampler on
the way down, n + 1 resnets on the way up, the last with the upsampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_INNER = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_DOWN, _UP = "down_blocks", "up_blocks"


def ldm_names(names: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Return the original name of each layer that has one.

    Args:
        names: diffusers' names of all layers of a UNet.
        layers_per_block: number of resnets of each level on the way down.
    """
    names = list(names)
    with_attention = {match[1] for name in names if (match := re.match(r"(up_blocks\.\d+)\.attentions\.", name))}
    found = {name: _ldm_name(name, layers_per_block, with_attention) for name in names}
    return {name: original for name, original in found.items() if original is not None}


def _ldm_name(name: str, layers: int, with_attention: set[str]) -> str | None:
    if name in _ENDS:
        return _ENDS[name]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_INNER.get(match[3], match[3])}"
    if not (match := re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)):
        return None
    side, level, part, index, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = level * (layers + 1) + (side == _DOWN)
    blocks = "input_blocks" if side == _DOWN else "output_blocks"
    match part:
        case "resnets":
            return f"{blocks}.{first + index}.0.{_INNER.get(inner, inner)}"
        case "attentions":
            return f"{blocks}.{first + index}.1.{inner}"
        case "downsamplers":
            return f"{blocks}.{first + layers}.0.op"
        case "upsamplers":
            place = 2 if f"{_UP}.{level}" in with_attention else 1
            return f"{blocks}.{first + layers}.{place}.conv"
    return None
