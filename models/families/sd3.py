"""Stable Diffusion 3 and 3.5 (Esser et al., 2024, arXiv:2403.03206): a rectified flow under three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.families.family import Family, own_latents, pack, packed_rows, unpack


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


def _context(config: Mapping[str, Any]) -> tuple[int, int]:
    return packed_rows(77 + 256, config["joint_attention_dim"], config["pooled_projection_dim"])


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    kind="SD3Transformer2DModel",
    encoders=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"),
    encode=_encode,
    forward=_forward,
    latents=own_latents,
    context=_context,
    kohya="lora_transformer_",
)
