"""Tiny StableDiffusionPipeline for tests: random weights in the real classes and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ATTENTION = r".*attn[12]\.to_(q|k|v|out\.0)"

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_TOKENS = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def clip_tokenizer(folder: Path) -> Any:
    """Create a CLIP tokenizer for letters and digits, with its vocabulary in the folder."""
    from transformers import CLIPTokenizer

    words = folder / "words"
    words.mkdir(parents=True, exist_ok=True)
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(_TOKENS)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=8)


def clip_config(width: int = 16, projection: int = 16) -> Any:
    """Create the configuration of a one-layer text encoder for the tokenizer of `clip_tokenizer`."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(_TOKENS),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=projection,
        bos_token_id=len(_TOKENS) - 2,
        eos_token_id=len(_TOKENS) - 1,
        pad_token_id=len(_TOKENS) - 1,
    )


def save_pipeline(folder: Path, *, channels: int = 1, prediction: str = "v_prediction", seed: int = 0) -> Path:
    """Save a pipeline with 16×16 pictures, 8×8×4 latents and a 74-token vocabulary, all in diffusers' own classes.

    Args:
        folder: parent of the pipeline's folder.
        channels: color channels of the pictures.
        prediction: prediction type of the scheduler.
        seed: seed of the weights.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def as_variant(folder: Path, name: str = "fp16", *, sharded: bool = False) -> Path:
    """Rename the weights of a pipeline to those of a variant, as if only that variant was downloaded.

    Args:
        folder: folder of the pipeline.
        name: name of the variant.
        sharded: whether to split each file into two shards.
    """
    from safetensors.torch import load_file, save_file

    for file in list(folder.glob("*/*.safetensors")):
        stem = file.name.removesuffix(".safetensors")
        if not sharded:
            file.rename(file.with_name(f"{stem}.{name}.safetensors"))
            continue
        tensors = load_file(file)
        shard_of = {key: number % 2 for number, key in enumerate(sorted(tensors))}
        names = [f"{stem}.{name}-0000{number + 1}-of-00002.safetensors" for number in range(2)]
        for number, shard in enumerate(names):
            part = {key: tensors[key] for key in tensors if shard_of[key] == number}
            save_file(part, file.with_name(shard), metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: names[number] for key, number in shard_of.items()}}
        file.with_name(f"{stem}.safetensors.index.{name}.json").write_text(json.dumps(index))
        file.unlink()
    return folder
