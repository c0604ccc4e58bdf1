"""Small bases of every family whose footprint is predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from models.diffusion.denoiser import Denoiser
from models.families.known import KNOWN_BASES, BaseSpec
from models.families.stable_diffusion import STABLE_DIFFUSION
from models.footprint.footprint import DUMMY_SCHEDULE


def _small(name: str, **config: Any) -> BaseSpec:
    return replace(KNOWN_BASES[name], config={**KNOWN_BASES[name].config, **config})


SMALL = {
    "unet": BaseSpec(
        family=STABLE_DIFFUSION,
        config={
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
            "sample_size": 16,
        },
    ),
    "sdxl": _small(
        "sdxl",
        block_out_channels=(16, 32, 32),
        cross_attention_dim=24,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=8,
        transformer_layers_per_block=(1, 1, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ),
    "pixart": _small(
        "pixart-sigma",
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=16,
    ),
    "sana": replace(
        _small(
            "sana-600m",
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=24,
            in_channels=4,
            out_channels=4,
        ),
        scale=8,
    ),
    "sd3": _small(
        "sd35-medium",
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ),
    "flux": _small(
        "flux-dev",
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(8, 12, 12),
    ),
}


def real(base: BaseSpec, *, sites: str | None = None, **how: str) -> Denoiser:
    """Build a base on the CPU with small random weights."""
    network = base.network().to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        nn.init.normal_(tensor, std=0.05)
    return Denoiser(network, DUMMY_SCHEDULE, sites=sites or base.family.sites, forward=base.family.forward, **how)
