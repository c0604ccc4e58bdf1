"""Sana (Xie et al., 2024, arXiv:2410.10629): a linear transformer on 32-fold latents, with a small LLM's tokens.

Captions follow the pipeline's own instruction to the LLM (§2.3); the unconditional caption has none. Captions are only
lowercased.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from models.families.family import Family, configured_latents, masked_caption_shape, pack, register, unpack_mask


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    tokens, mask, _, _ = pipeline.encode_prompt(
        caption or "",
        do_classifier_free_guidance=False,
        device=pipeline.device,
        complex_human_instruction=None if caption is None else instruction,
    )
    return pack(tokens[0], mask[0])


def _forward(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    config: Any = network.config
    tokens, mask = unpack_mask(context)
    output: Tensor = network(
        x,
        encoder_hidden_states=tokens,
        encoder_attention_mask=mask,
        timestep=t * config.timestep_scale,
        return_dict=False,
    )[0]
    return output


SANA = register(
    Family(
        name="sana",
        pipeline="SanaPipeline",
        network="transformer",
        kind="SanaTransformer2DModel",
        encoders=("tokenizer", "text_encoder"),
        encode=_encode,
        forward=_forward,
        latents=configured_latents,
        context=masked_caption_shape,
        kohya=None,
    )
)
