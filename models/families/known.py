"""Bases without weights: published bases at full size, for planning before a download, and bases in folders.

Configurations are those of the checkpoints' own `config.json`, where they differ from the class's defaults; parameter
counts (tested on the meta device) are the published ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import AntherError, summary
from models.families.checkpoint import recognize
from models.families.family import Family
from models.families.flux import FLUX
from models.families.pixart import PIXART
from models.families.sana import SANA
from models.families.sd3 import SD3
from models.families.sdxl import SDXL
from models.families.stable_diffusion import STABLE_DIFFUSION
from models.files import assets
from models.files.diffusers_classes import diffusers_class


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """Architecture of one base."""

    family: Family
    config: Mapping[str, Any]  # values of the network's configuration that differ from the class's defaults
    scale: int = 8  # pixels per latent along a side
    name: str = "base"  # for messages

    def full_config(self) -> dict[str, Any]:
        """Return the configuration including the class's defaults."""
        defaults = inspect.signature(diffusers_class(self.family.kind)).parameters.values()
        return {parameter.name: parameter.default for parameter in defaults} | dict(self.config)

    def network(self) -> nn.Module:
        """Build the network on the meta device."""
        try:
            with torch.device("meta"):
                network: nn.Module = diffusers_class(self.family.kind)(**self.config)
        except Exception as error:  # the libraries raise a dozen kinds for a foreign configuration
            raise AntherError(
                f"{self.name}: can't build a {self.family.kind} from its configuration ({summary(error)})"
            ) from error
        return network.requires_grad_(False).eval()


def find_base(base: str) -> BaseSpec:
    """Return the published base of this name, or that of a pipeline's folder; no weights are read.

    Raises:
        AntherError: it is neither.
    """
    if base in KNOWN_BASES:
        return KNOWN_BASES[base]
    try:
        folder = assets.locate(base)
    except AntherError as error:
        raise AntherError(f"{error}; nor a published base ({', '.join(KNOWN_BASES)})") from error
    checkpoint = recognize(folder)
    config = checkpoint.config(checkpoint.family.network)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return BaseSpec(family=checkpoint.family, config=public, scale=checkpoint.scale, name=f"base {folder}")


def _unet(attention: int, **changes: Any) -> BaseSpec:
    """Return a UNet like Stable Diffusion 1.5's, with this width of text embeddings."""
    config = {"sample_size": 64, "cross_attention_dim": attention, "attention_head_dim": 8} | changes
    return BaseSpec(family=STABLE_DIFFUSION, config=config)


def _sd3(heads: int, **changes: Any) -> BaseSpec:
    config = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
    }
    return BaseSpec(family=SD3, config=config | changes)


def _sana(**changes: Any) -> BaseSpec:
    return BaseSpec(family=SANA, config={"sample_size": 32} | changes, scale=32)


_FEWER = {"layers_per_block": 1}
_TINY = {
    **_FEWER,
    "mid_block_type": None,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}

KNOWN_BASES: dict[str, BaseSpec] = {
    "sd15": _unet(768),  # stable-diffusion-v1-5
    "sd21": _unet(1024, sample_size=96, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    "bk-sdm-base": _unet(768, **_FEWER),  # arXiv:2305.15798, table 1
    "bk-sdm-small": _unet(768, **_FEWER, mid_block_type=None),
    "bk-sdm-tiny": _unet(768, **_TINY),
    "sdxl": BaseSpec(  # stable-diffusion-xl-base-1.0
        family=SDXL,
        config={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "pixart-sigma": BaseSpec(  # PixArt-Sigma-XL-2-1024-MS
        family=PIXART,
        config={
            "sample_size": 128,
            "num_layers": 28,
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
    ),
    "sd35-medium": _sd3(24, num_layers=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
    "sd35-large": _sd3(38, num_layers=38, pos_embed_max_size=192),
    "flux-dev": BaseSpec(family=FLUX, config={"guidance_embeds": True}),  # FLUX.1-dev
    "flux-schnell": BaseSpec(family=FLUX, config={"guidance_embeds": False}),
    "sana-1600m": _sana(),  # Sana_1600M_1024px
    "sana-600m": _sana(
        num_attention_heads=36,
        num_layers=28,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
}
