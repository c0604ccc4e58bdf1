"""Modules of the glyph base, in the layout of a Stable Diffusion pipeline.

A glyph is [1, 64, 64] in [-1, 1] (ink -1, paper +1); its latent is [4, 16, 16]; a caption is 16 tokens. Most of the
UNet's weights, and all attention, are at 8×8 and 4×4, where the cost per weight is a quarter and a sixteenth of that at
16×16. Every normalization is per sample.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("lowercase", "capital", "letter", "digit")  # one token each; in this order their merges don't conflict
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 16  # positions of a caption
TEXT_WIDTH = 128
UNET_CHANNELS = (48, 96, 128)  # at 16×16, 8×8 and 4×4
VAE_CHANNELS = (32, 64, 128)  # at 64×64, 32×32 and 16×16


def byte_symbols() -> list[str]:
    """Return the printable characters that represent the 256 bytes in byte-level BPE (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token ids and merges: every byte, inside a word and at its end, and the words of the captions."""
    symbols = byte_symbols()
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges.append(("".join(pieces[:i]), pieces[i]))
    merges = list(dict.fromkeys(merges))
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer that splits captions into words and any other text into bytes."""
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def text_encoder() -> CLIPTextModel:
    """Build a two-layer CLIP text model: token ids [B, 16] -> [B, 16, 128]."""
    vocab, _ = vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=vocab[START],
            eos_token_id=vocab[END],
            pad_token_id=vocab[END],
        )
    )


def autoencoder() -> AutoencoderKL:
    """Build an f4 autoencoder (Rombach et al., 2022): [B, 1, 64, 64] <-> [B, 4, 16, 16]."""
    blocks = len(VAE_CHANNELS)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
    )


def unet() -> UNet2DConditionModel:
    """Build the denoiser: latents [B, 4, 16, 16], timesteps [B], context [B, 16, 128] -> v [B, 4, 16, 16]."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=(3, 3, 4),  # diffusers' name for the number of heads: 32 channels each
        cross_attention_dim=TEXT_WIDTH,
    )


def scheduler() -> DDIMScheduler:
    """Return a cosine schedule with zero terminal SNR and trailing timesteps (Lin et al., 2024), v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def pipeline(*, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Combine the parts to a `StableDiffusionPipeline` without progress bar and safety checker.

    Args:
        vae: autoencoder.
        text_encoder: CLIP text model.
        unet: denoiser.
    """
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save the pipeline as fp16 safetensors, with the tokenizer in both of its file layouts."""
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    config = folder / "text_encoder" / "config.json"  # transformers loads in this dtype, diffusers in fp32
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    vocab, merges = vocabulary()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
