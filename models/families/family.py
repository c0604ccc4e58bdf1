"""Interface of a family of bases: caption encoding, network call, and default sites.

A module registers its family by `register`; an installed package declares one as an entry point in the group
`anther.family`, named like the class of its pipelines.

A family packs everything that represents one caption into one tensor [rows, d], and unpacks it in its forward: tokens
first, then vectors (a pooled embedding, a mask) cut into rows. Therefore trainer and sampler handle a single tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.plugins import Registry
from models.diffusion.denoiser import Forward
from models.diffusion.sites import ATTENTION
from models.families.kohya import KohyaFormat


class Latents(NamedTuple):
    """Latents that a network takes."""

    channels: int
    side: int | None  # at the native resolution; None: the configuration doesn't say
    patch: int  # latents per token along a side; sides must be multiples of it


@dataclass(frozen=True, kw_only=True)
class Family:
    """Kind of base; every pipeline class belongs to one family."""

    name: str
    pipeline: str  # class in model_index.json
    network: str  # folder of the network, and prefix of exported keys: 'unet' | 'transformer'
    kind: str  # class of the network
    encoders: tuple[str, ...]  # folders of the text encoders and their tokenizers
    encode: Callable[[Any, str | None], Tensor]
    """(pipeline with these encoders, caption) -> [rows, d]; None is the unconditional caption."""
    forward: Forward
    latents: Callable[[Mapping[str, Any]], Latents]  # from the network's configuration
    context: Callable[[Mapping[str, Any]], tuple[int, int]]  # likewise: rows and width of a packed caption
    kohya: KohyaFormat | None  # layer names in kohya's layout; None: no tool reads it for this family
    guide: Callable[[Tensor, float], Tensor] | None = None
    """Sets the guidance scale in packed captions, for networks that embed it; None: guidance needs two passes."""
    logit_normal: bool = False  # whether a flow's training favors the middle of the schedule
    latent_statistics: bool = False  # whether the pipeline uses a VAE's latents_mean and latents_std
    sites: str = ATTENTION  # default sites, named `attention`
    joint_attention: bool = False  # whether text and picture form one sequence: no layer attends only to the text


FAMILIES: Registry[Family] = Registry("family", key="base.path", modules="models.families", on_device=True)
"""Families by the class of their pipelines in model_index.json."""


def register(family: Family) -> Family:
    """Register a family under its pipeline's class, in the module that defines it."""
    return FAMILIES.register(family.pipeline)(family)


def configured_latents(config: Mapping[str, Any]) -> Latents:
    """Return the latents of a network whose configuration states them."""
    side = config.get("sample_size")
    if isinstance(side, list | tuple) and len({*side}) == 1:
        side = side[0]  # height and width
    side = side if isinstance(side, int) and not isinstance(side, bool) else None
    return Latents(config["in_channels"], side, config.get("patch_size") or 1)


def packed_caption_shape(tokens: int, width: int, *vectors: int) -> tuple[int, int]:
    """Return rows and width of this many tokens with vectors of these lengths packed below."""
    return tokens + sum(-(-length // width) for length in vectors), width


def masked_caption_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and width of 300 tokens with their mask packed below, as in PixArt-Sigma and Sana."""
    return packed_caption_shape(300, config["caption_channels"], 300)


def pack(tokens: Tensor, vector: Tensor) -> Tensor:
    """Append a vector to tokens [l, d], cut into rows and zero-padded: [l + rows, d]."""
    width = tokens.shape[-1]
    return torch.cat([tokens, F.pad(vector.to(tokens), (0, -len(vector) % width)).view(-1, width)])


def unpack(context: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split packed captions [N, l + rows, d] into tokens [N, l, d] and vectors [N, size]."""
    rows = -(-size // context.shape[-1])
    return context[:, :-rows], context[:, -rows:].flatten(1)[:, :size]


def unpack_mask(context: Tensor) -> tuple[Tensor, Tensor]:
    """Split packed captions [N, l + rows, d] into tokens [N, l, d] and their mask [N, l]."""
    total, width = context.shape[1:]
    return unpack(context, total - -(-total // (width + 1)))
