"""Stable Diffusion 3 and 3.5 (Esser et al., 2024, arXiv:2403.03206): a rectified flow under three text encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.families.family import Family, own_latents, pack, unpack


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        caption or "", None, None, device=pipeline.device, do_classifier_free_guidance=False
    )
    return pack(tokens[0], pooled[0])


def _forward(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    config: Any = network.config
    tokens, pooled = unpack(context, config.pooled_projection_dim)
    output: Tensor = network(
        x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=t, return_dict=False
    )[0]  # fmt: skip
    return output


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    kind="SD3Transformer2DModel",
    encoders=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"),
    encode=_encode,
    forward=_forward,
    latents=own_latents,
    kohya="lora_transformer_",
)
