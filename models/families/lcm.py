"""UNets that were distilled to take the guidance scale as an input (Luo et al., 2023, arXiv:2310.04378, §4.2).

They are trained at guidance scale 1, as Flux [dev] is, and sampled at any scale in one pass. The scale is the last row
of a packed caption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.families.family import Family, pack


def with_guidance_embedding(family: Family) -> Family:
    """Return a UNet's family, adapted to a UNet with `time_cond_proj_dim`."""
    return replace(
        family,
        encode=partial(_encode, family),
        forward=partial(_forward, family),
        context=partial(_context, family),
        guide=guide,
    )


def guide(context: Tensor, strength: float) -> Tensor:
    """Set the guidance strength in packed captions [N, rows, d]."""
    context = context.clone()
    context[:, -1, 0] = strength
    return context


def embedding(strengths: Tensor, width: int) -> Tensor:
    """Return sines and cosines [N, width] of 1000 (w - 1), as in the pipelines' `get_guidance_scale_embedding`."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=strengths.device) * -(math.log(10_000.0) / (half - 1)))
    phases = 1000.0 * (strengths.float() - 1)[:, None] * rates
    embedded = torch.cat([phases.sin(), phases.cos()], dim=1)
    return nn.functional.pad(embedded, (0, width % 2)).to(strengths.dtype)


def _encode(family: Family, pipeline: Any, caption: str | None) -> Tensor:
    tokens = family.encode(pipeline, caption)
    return pack(tokens, tokens.new_ones(1))


def _forward(family: Family, network: Any, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    guidance = embedding(context[:, -1, 0], network.config.time_cond_proj_dim)
    unet: Any = family.forward  # the family of a UNet
    output: Tensor = unet(network, x, t, context[:, :-1], timestep_cond=guidance)
    return output


def _context(family: Family, config: Mapping[str, Any]) -> tuple[int, int]:
    rows, width = family.context(config)
    return rows + 1, width
