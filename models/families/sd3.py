"""Stable Diffusion 3 and 3.5 (Esser et al., 2024, arXiv:2403.03206): a rectified flow with three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.families.family import Family, configured_latents, pack, packed_caption_shape, register, unpack
from models.families.kohya import KohyaFormat, map_names, map_qkv


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        caption or "", None, None, device=pipeline.device, do_classifier_free_guidance=False
    )
    return pack(tokens[0], pooled[0])


def _forward(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    config: Any = network.config
    tokens, pooled = unpack(context, config.pooled_projection_dim)
    output: Tensor = network(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=t, return_dict=False)[
        0
    ]
    return output


def _context(config: Mapping[str, Any]) -> tuple[int, int]:
    return packed_caption_shape(77 + 256, config["joint_attention_dim"], config["pooled_projection_dim"])


_BLOCK = r"transformer_blocks\.(\d+)\."
_KOHYA = KohyaFormat(
    network_module="networks.lora_sd3",
    names=(
        *map_qkv(_BLOCK + r"attn\.to_%s", r"joint_blocks.\1.x_block.attn.qkv"),
        *map_qkv(_BLOCK + r"attn2\.to_%s", r"joint_blocks.\1.x_block.attn2.qkv"),
        *map_qkv(_BLOCK + r"attn\.add_%s_proj", r"joint_blocks.\1.context_block.attn.qkv"),
        *map_names(
            {
                _BLOCK + r"attn\.to_out\.0": r"joint_blocks.\1.x_block.attn.proj",
                _BLOCK + r"attn2\.to_out\.0": r"joint_blocks.\1.x_block.attn2.proj",
                _BLOCK + r"attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
                _BLOCK + r"ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
                _BLOCK + r"ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
                _BLOCK + r"ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
                _BLOCK + r"ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
                _BLOCK + r"norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
                _BLOCK + r"norm1_context\.linear": r"joint_blocks.\1.context_block.adaLN_modulation.1",
                r"pos_embed\.proj": "x_embedder.proj",
                "context_embedder": "context_embedder",
                r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
                r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
                r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
                r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
                r"norm_out\.linear": "final_layer.adaLN_modulation.1",
                "proj_out": "final_layer.linear",
            }
        ),
    ),
)

SD3 = register(
    Family(
        name="sd3",
        pipeline="StableDiffusion3Pipeline",
        network="transformer",
        kind="SD3Transformer2DModel",
        encoders=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"),
        encode=_encode,
        forward=_forward,
        latents=configured_latents,
        context=_context,
        kohya=_KOHYA,
        logit_normal=True,
        joint_attention=True,
    )
)
