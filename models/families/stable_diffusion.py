"""Stable Diffusion 1.x and 2.x (Rombach et al., 2022, arXiv:2112.10752), and UNets distilled from them.

2.x has another text encoder and mostly predicts v; BK-SDM (Kim et al., 2023, arXiv:2305.15798) and tiny-sd have fewer
blocks. Their configurations describe these differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.diffusion.denoiser import call_unet
from models.families.family import Family, configured_latents, register
from models.families.kohya import UNET_KOHYA


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    embeddings: Tensor = pipeline.encode_prompt(caption or "", pipeline.device, 1, False)[0]
    return embeddings[0]


def _context(config: Mapping[str, Any]) -> tuple[int, int]:
    return 77, config["cross_attention_dim"]


STABLE_DIFFUSION = register(
    Family(
        name="stable-diffusion",
        pipeline="StableDiffusionPipeline",
        network="unet",
        kind="UNet2DConditionModel",
        encoders=("tokenizer", "text_encoder"),
        encode=_encode,
        forward=call_unet,
        latents=configured_latents,
        context=_context,
        kohya=UNET_KOHYA,
    )
)
