"""SDXL (Podell et al., 2023, arXiv:2307.01952): two text encoders, a pooled embedding, and the image size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.families.family import Family, configured_latents, pack, packed_caption_shape, register, unpack
from models.families.kohya import UNET_KOHYA

_SCALE = 8  # pixels per latent, of every SDXL VAE


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        caption or "", device=pipeline.device, do_classifier_free_guidance=False
    )
    packed = pack(tokens[0], pooled[0])
    zeros = caption is None and pipeline.config.force_zeros_for_empty_prompt
    return torch.zeros_like(packed) if zeros else packed


def _forward(
    network: nn.Module, x: Tensor, t: Tensor, context: Tensor, *, timestep_cond: Tensor | None = None
) -> Tensor:
    """Call the network as for images that are neither cropped nor resized (§2.2).

    The size conditioning is (height, width, 0, 0, height, width).
    """
    tokens, pooled = unpack(context, _pooled(cast(Any, network).config))
    sizes = x.new_zeros(len(x), 6)
    sizes[:, 0::4], sizes[:, 1::4] = x.shape[-2] * _SCALE, x.shape[-1] * _SCALE
    added = {"text_embeds": pooled, "time_ids": sizes}
    output: Tensor = network(
        x, t, encoder_hidden_states=tokens, added_cond_kwargs=added, timestep_cond=timestep_cond, return_dict=False
    )[0]
    return output


def _pooled(config: Mapping[str, Any]) -> int:
    """Return the length of the pooled embedding."""
    return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])


def _context(config: Mapping[str, Any]) -> tuple[int, int]:
    return packed_caption_shape(77, config["cross_attention_dim"], _pooled(config))


SDXL = register(
    Family(
        name="sdxl",
        pipeline="StableDiffusionXLPipeline",
        network="unet",
        kind="UNet2DConditionModel",
        encoders=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        encode=_encode,
        forward=_forward,
        latents=configured_latents,
        context=_context,
        kohya=UNET_KOHYA,
        latent_statistics=True,
    )
)
