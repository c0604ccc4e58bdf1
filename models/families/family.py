"""What a base's family decides: how captions are encoded, what the network is called with, where adapters go.

A family packs all that stands for one caption into one tensor [rows, d], and takes it apart inside its forward: tokens
first, then vectors (a pooled embedding, a mask) cut into rows. So trainer and sampler know of one tensor only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base.denoiser import Forward
from models.export.kohya import KohyaFormat

ATTENTION = r".*\.attn[12]?\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)"
"""The projections of every attention, with those of the text where it runs along: what most LoRAs adapt."""


class Latents(NamedTuple):
    """The latents that a network takes."""

    channels: int
    side: int | None  # of its own resolution; None: its configuration doesn't say
    patch: int  # the side of a token: what a side must be a multiple of


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of base; every pipeline class belongs to one."""

    name: str
    pipeline: str  # class in model_index.json
    network: str  # folder of the network, and what its exported keys begin with: 'unet' | 'transformer'
    kind: str  # class of the network
    encoders: tuple[str, ...]  # folders of the text encoders and their tokenisers
    encode: Callable[[Any, str | None], Tensor]
    """(pipeline that holds these encoders, caption) -> [rows, d]; of None: what guidance leads away from."""
    forward: Forward
    latents: Callable[[Mapping[str, Any]], Latents]  # from the network's configuration
    context: Callable[[Mapping[str, Any]], tuple[int, int]]  # from the same: rows and width of a packed caption
    kohya: KohyaFormat | None  # its layers' names in kohya's layout; None: no tool reads it of this family
    guide: Callable[[Tensor, float], Tensor] | None = None
    """Writes the strength of guidance into packed captions, for networks that embed it; None: guided by two passes."""
    logit_normal: bool = False  # whether its flow is trained in the middle more often
    latent_statistics: bool = False  # whether its pipeline uses a VAE's latents_mean and latents_std
    sites: str = ATTENTION  # where adapters go unless one says otherwise


def configured_latents(config: Mapping[str, Any]) -> Latents:
    """The latents of a network that names them in its configuration."""
    side = config.get("sample_size")
    if isinstance(side, list | tuple) and len({*side}) == 1:
        side = side[0]  # height and width
    side = side if isinstance(side, int) and not isinstance(side, bool) else None
    return Latents(config["in_channels"], side, config.get("patch_size") or 1)


def packed_caption_shape(tokens: int, width: int, *vectors: int) -> tuple[int, int]:
    """Rows and width of so many tokens with vectors of these lengths packed underneath."""
    return tokens + sum(-(-length // width) for length in vectors), width


def masked_caption_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and width of 300 tokens with their mask underneath, as PixArt-Sigma and Sana take them."""
    return packed_caption_shape(300, config["caption_channels"], 300)


def pack(tokens: Tensor, vector: Tensor) -> Tensor:
    """Tokens [l, d] with a vector cut into rows underneath, filled up with zeros: [l + rows, d]."""
    width = tokens.shape[-1]
    return torch.cat([tokens, F.pad(vector.to(tokens), (0, -len(vector) % width)).view(-1, width)])


def unpack(context: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tokens [N, l, d] and the vectors [N, size] of packed captions [N, l + rows, d]."""
    rows = -(-size // context.shape[-1])
    return context[:, :-rows], context[:, -rows:].flatten(1)[:, :size]


def unpack_mask(context: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [N, l, d] and their mask [N, l] of packed captions [N, l + rows, d], with one number for each token."""
    total, width = context.shape[1:]
    return unpack(context, total - -(-total // (width + 1)))
