"""PixArt-Σ (Chen et al., 2024, arXiv:2403.04692): a diffusion transformer on T5's tokens and their mask.

Captions are only lowercased: the pipeline's further cleaning is meant for captions from the web.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.families.family import Family, configured_latents, masked_caption_shape, pack, register, unpack_mask


def _encode(pipeline: Any, caption: str | None) -> Tensor:
    tokens, mask, _, _ = pipeline.encode_prompt(
        caption or "", do_classifier_free_guidance=False, device=pipeline.device
    )
    return pack(tokens[0], mask[0])


def _forward(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Drop the second half of the output of a network that also predicts its variance."""
    tokens, mask = unpack_mask(context)
    output: Tensor = network(
        x,
        encoder_hidden_states=tokens,
        encoder_attention_mask=mask,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output[:, : x.shape[1]]


PIXART = register(
    Family(
        name="pixart-sigma",
        pipeline="PixArtSigmaPipeline",
        network="transformer",
        kind="PixArtTransformer2DModel",
        encoders=("tokenizer", "text_encoder"),
        encode=_encode,
        forward=_forward,
        latents=configured_latents,
        context=masked_caption_shape,
        kohya=None,
    )
)
