"""Networks by their configuration alone: those that people know, at full size, and any in a folder.

For predictions on the meta device: nothing here has weights. The configurations are those of the published
checkpoints; each is held to the number of parameters that its paper or card names (`tests/models`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.errors import AntherError
from models import assets
from models.footprint import Inputs

ATTENTION = r".*attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
CROSS_ATTENTION = r".*attn2\.(to_[qkv]|to_out\.0)"


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        kind: its class in diffusers.
        config: that class' arguments.
        scale: pixels of a picture for each of its latents, along a side.
        resolution: side in pixels of the pictures that it was made for.
        tokens: length of its text embeddings.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    scale: int = 8
    resolution: int = 512
    tokens: int = 77

    @property
    def has_cross_attention(self) -> bool:
        """Whether text enters through layers of its own, rather than in one sequence with the picture."""
        return self.kind not in ("SD3Transformer2DModel", "FluxTransformer2DModel")

    def build(self) -> nn.Module:
        """The network on the meta device."""
        import diffusers  # a slow import, so only here

        with torch.device("meta"):
            network: nn.Module = getattr(diffusers, self.kind)(**self.config)
        return network

    def inputs(self, resolution: int) -> Inputs:
        """What the network is called with, for pictures of this side in pixels."""
        if resolution % self.scale:
            raise AntherError(f"resolution={resolution}: must be a multiple of {self.scale} for {self.name}")
        side = resolution // self.scale
        return lambda batch: KINDS[self.kind](self, side, batch)


def _unet(of: Architecture, side: int, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "sample": torch.zeros(batch, of.config.get("in_channels", 4), side, side),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch, of.tokens, of.config["cross_attention_dim"]),
    }
    if of.config.get("addition_embed_type") == "text_time":
        pooled = of.config["projection_class_embeddings_input_dim"] - 6 * of.config["addition_time_embed_dim"]
        found["added_cond_kwargs"] = {"text_embeds": torch.zeros(batch, pooled), "time_ids": torch.zeros(batch, 6)}
    return found


def _captioned(of: Architecture, side: int, batch: int) -> dict[str, Any]:
    """PixArt and Sana."""
    return {
        "hidden_states": torch.zeros(batch, of.config["in_channels"], side, side),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch, of.tokens, of.config["caption_channels"]),
        "encoder_attention_mask": torch.ones(batch, of.tokens),
    }


def _pixart(of: Architecture, side: int, batch: int) -> dict[str, Any]:
    return {**_captioned(of, side, batch), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3(of: Architecture, side: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(batch, of.config["in_channels"], side, side),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch, of.tokens, of.config["joint_attention_dim"]),
        "pooled_projections": torch.zeros(batch, of.config["pooled_projection_dim"]),
    }


def _flux(of: Architecture, side: int, batch: int) -> dict[str, Any]:
    patches = (side // 2) ** 2
    return {
        "hidden_states": torch.zeros(batch, patches, of.config["in_channels"]),
        "timestep": torch.zeros(batch),
        "guidance": torch.zeros(batch) if of.config["guidance_embeds"] else None,
        "encoder_hidden_states": torch.zeros(batch, of.tokens, of.config["joint_attention_dim"]),
        "pooled_projections": torch.zeros(batch, of.config["pooled_projection_dim"]),
        "txt_ids": torch.zeros(of.tokens, 3),
        "img_ids": torch.zeros(patches, 3),
    }


KINDS: dict[str, Callable[[Architecture, int, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _captioned,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}

_SD1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD1_SMALL: dict[str, Any] = {  # Kim et al., 2023, arXiv:2305.15798: fewer layers, and no middle
    **_SD1, "layers_per_block": 1, "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip

BUILT_IN = {
    architecture.name: architecture
    for architecture in (
        Architecture("sd15", "UNet2DConditionModel", _SD1),
        Architecture("bk_sdm_small", "UNet2DConditionModel", _SD1_SMALL),
        Architecture("bk_sdm_tiny", "UNet2DConditionModel", {
            **_SD1_SMALL, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        }),
        Architecture("sd21", "UNet2DConditionModel", {
            "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        }, resolution=768),
        Architecture("sdxl", "UNet2DConditionModel", {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }, resolution=1024),
        Architecture("pixart_sigma", "PixArtTransformer2DModel", {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "num_layers": 28, "cross_attention_dim": 1152, "sample_size": 128, "patch_size": 2,
            "caption_channels": 4096, "use_additional_conditions": False,
        }, resolution=1024, tokens=300),
        Architecture("sana_600m", "SanaTransformer2DModel", {
            "in_channels": 32, "out_channels": 32, "num_attention_heads": 36, "attention_head_dim": 32,
            "num_layers": 28, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152, "caption_channels": 2304, "mlp_ratio": 2.5, "sample_size": 32,
            "patch_size": 1,
        }, scale=32, resolution=1024, tokens=300),
        Architecture("sd35_medium", "SD3Transformer2DModel", {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        }, resolution=1024, tokens=333),
        Architecture("flux_dev", "FluxTransformer2DModel", {
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True,
        }, resolution=1024, tokens=512),
    )
}  # fmt: skip


def find(base: str) -> Architecture:
    """The built-in architecture of that name, or that of a pipeline's folder or a shipped base.

    Raises:
        AntherError: neither, or a folder that holds no network of a kind that is known here.
    """
    if base in BUILT_IN:
        return BUILT_IN[base]
    try:
        folder = assets.locate(base)
    except AntherError as error:
        raise AntherError(f"{error}; nor a configuration that is known here ({', '.join(BUILT_IN)})") from error
    for part in ("unet", "transformer"):
        if (folder / part / "config.json").is_file():
            return _read(base, folder, part)
    raise AntherError(f"base={base}: neither unet/config.json nor transformer/config.json is in {folder}")


def _read(base: str, folder: Path, part: str) -> Architecture:
    try:
        config = json.loads((folder / part / "config.json").read_text())
        vae = json.loads((folder / "vae" / "config.json").read_text())
        text = json.loads((folder / "text_encoder" / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise AntherError(f"base={base}: its configuration can't be read ({error}): copy the whole folder") from error
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise AntherError(f"base={base}: its network is a {kind}; known here: {', '.join(KINDS)}")
    widths = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
    scale = 2 ** (len(widths) - 1)
    patch = 2 if kind == "FluxTransformer2DModel" else 1
    return Architecture(
        base, kind, {key: value for key, value in config.items() if not key.startswith("_")}, scale=scale * patch,
        resolution=scale * config.get("sample_size", 128), tokens=text.get("max_position_embeddings", 77),
    )  # fmt: skip
