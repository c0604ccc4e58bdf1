"""FLUX.1 (Black Forest Labs, 2024): a rectified flow whose latents are cut into 2 × 2 patches outside the network.

[dev] was distilled from guided predictions and embeds the guidance scale. It is trained at 1, where it predicts the
unguided flow, and sampled at any scale in one pass. [schnell] has no such input: guidance has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.families.family import Family, Latents, pack, packed_caption_shape, register, unpack
from models.families.kohya import FusedPart, KohyaFormat, map_names, map_qkv

_SIDE = 128  # latents of 1024 pixels: the pipeline's default, because the network's configuration has none


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    """Encode a caption; the last row is reserved for the guidance scale."""
    tokens, pooled, _ = pipeline.encode_prompt(caption or "", device=pipeline.device)
    return pack(pack(tokens[0], pooled[0]), pooled.new_ones(1))


def _guide(context: Tensor, strength: float) -> Tensor:
    context = context.clone()
    context[:, -1, 0] = strength
    return context


def _forward(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    config: Any = network.config
    tokens, pooled = unpack(context[:, :-1], config.pooled_projection_dim)
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    output: Tensor = network(
        patchify(x),
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=t / 1000,
        guidance=context[:, -1, 0] if config.guidance_embeds else None,
        img_ids=position_ids(height, width, like=x),
        txt_ids=x.new_zeros(tokens.shape[1], 3),
        return_dict=False,
    )[0]
    return unpatchify(output, height, width)


def patchify(x: Tensor) -> Tensor:
    """Cut latents into patches: [N, c, 2h, 2w] -> [N, h·w, 4c]."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert `patchify`.

    Args:
        tokens: [N, h·w, 4c].
        height: h.
        width: w.

    Returns:
        [N, c, 2h, 2w].
    """
    grid = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def position_ids(height: int, width: int, *, like: Tensor) -> Tensor:
    """Return (0, row, column) of each patch.

    Args:
        height: h.
        width: w.
        like: sets device and dtype.

    Returns:
        [h·w, 3].
    """
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)
    return ids.flatten(0, 1)


def _latents(config: Mapping[str, Any]) -> Latents:
    return Latents(config["in_channels"] // 4, _SIDE, 2)


def _context(config: Mapping[str, Any]) -> tuple[int, int]:
    return packed_caption_shape(512, config["joint_attention_dim"], config["pooled_projection_dim"], 1)


_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_KOHYA = KohyaFormat(
    network_module="networks.lora_flux",
    read=r"(?!norm_out\.|proj_out$).*",
    names=(
        *map_qkv(_DOUBLE + r"attn\.to_%s", r"double_blocks.\1.img_attn.qkv"),
        *map_qkv(_DOUBLE + r"attn\.add_%s_proj", r"double_blocks.\1.txt_attn.qkv"),
        *map_qkv(_SINGLE + r"attn\.to_%s", r"single_blocks.\1.linear1", further_rows=4),
        (_SINGLE + "proj_mlp", FusedPart(r"single_blocks.\1.linear1", 3, (1, 1, 1, 4))),
        *map_names(
            {
                _DOUBLE + r"attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
                _DOUBLE + r"attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
                _DOUBLE + r"ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
                _DOUBLE + r"ff\.net\.2": r"double_blocks.\1.img_mlp.2",
                _DOUBLE + r"ff_context\.net\.0\.proj": r"double_blocks.\1.txt_mlp.0",
                _DOUBLE + r"ff_context\.net\.2": r"double_blocks.\1.txt_mlp.2",
                _DOUBLE + r"norm1\.linear": r"double_blocks.\1.img_mod.lin",
                _DOUBLE + r"norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
                _SINGLE + r"norm\.linear": r"single_blocks.\1.modulation.lin",
                _SINGLE + "proj_out": r"single_blocks.\1.linear2",
                "x_embedder": "img_in",
                "context_embedder": "txt_in",
                r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
                r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
                r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
                r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
                r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
                r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
                r"norm_out\.linear": "final_layer.adaLN_modulation.1",
                "proj_out": "final_layer.linear",
            }
        ),
    ),
)

FLUX = register(
    Family(
        name="flux",
        pipeline="FluxPipeline",
        network="transformer",
        kind="FluxTransformer2DModel",
        encoders=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        encode=_encode,
        forward=_forward,
        latents=_latents,
        context=_context,
        kohya=_KOHYA,
        guide=_guide,
        joint_attention=True,
    )
)
