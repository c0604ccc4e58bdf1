"""Tiny pipelines of every family for tests: random weights in the real classes and layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from bench.lib.tiny import LETTERS, clip_config, clip_tokenizer, save_pipeline


def _autoencoder(channels: int = 4, blocks: int = 2, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **more,
    )


def _t5(width: int = 16) -> tuple[Any, Any]:
    """Create a T5 tokenizer for letters and digits, and a one-layer encoder."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return tokenizer, transformers.T5EncoderModel(config)


def _clip(width: int, projection: int) -> Any:
    return transformers.CLIPTextModelWithProjection(clip_config(width, projection))


def stable_diffusion(folder: Path) -> Path:
    """Save an SD 1.x pipeline, which predicts ε."""
    return save_pipeline(folder, channels=3, prediction="epsilon")


def stable_diffusion_2(folder: Path) -> Path:
    """Save an SD 2.x pipeline, which predicts v and has linear projections."""
    path = save_pipeline(folder, channels=3)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )
    unet.save_pretrained(path / "unet")
    return path


def distilled(folder: Path) -> Path:
    """Save a pipeline like BK-SDM-Tiny: two levels of one layer and no middle block."""
    path = save_pipeline(folder, channels=3, prediction="epsilon")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        mid_block_type=None,
        attention_head_dim=8,
    )
    unet.save_pretrained(path / "unet")
    return path


def sdxl(folder: Path) -> Path:
    """Save an SDXL pipeline, with a VAE of four levels because SDXL is conditioned on sizes in pixels."""
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=_autoencoder(blocks=4),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        text_encoder=transformers.CLIPTextModel(clip_config()),
        text_encoder_2=_clip(16, 20),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def pixart(folder: Path) -> Path:
    """Save a PixArt pipeline, which also predicts the variance like the published one."""
    tokenizer, encoder = _t5()
    pipeline = diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_autoencoder(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=16,
            interpolation_scale=2,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def sd3(folder: Path) -> Path:
    """Save a pipeline like SD 3.5 medium: dual attention in the first block, normalized queries and keys."""
    tokenizer, encoder = _t5(32)
    pipeline = diffusers.StableDiffusion3Pipeline(
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        tokenizer_3=tokenizer,
        text_encoder=_clip(16, 16),
        text_encoder_2=_clip(16, 16),
        text_encoder_3=encoder,
        vae=_autoencoder(16, shift_factor=0.0609, scaling_factor=1.5305),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def flux(folder: Path, *, dev: bool = True) -> Path:
    """Save a FLUX pipeline: [dev] embeds the guidance scale and shifts σ by picture size, [schnell] does neither."""
    tokenizer, encoder = _t5()
    pipeline = diffusers.FluxPipeline(
        tokenizer=clip_tokenizer(folder),
        text_encoder=transformers.CLIPTextModel(clip_config()),
        tokenizer_2=tokenizer,
        text_encoder_2=encoder,
        vae=_autoencoder(4, shift_factor=0.1159),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev, base_image_seq_len=4),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def flux_schnell(folder: Path) -> Path:
    """Save a FLUX pipeline like [schnell]."""
    return flux(folder, dev=False)


def sana(folder: Path) -> Path:
    """Save a Sana pipeline, with a deterministic autoencoder and Gemma 2 as text encoder."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    words = {token: index for index, token in enumerate([*special, *LETTERS])}
    config = transformers.Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    pipeline = diffusers.SanaPipeline(
        tokenizer=transformers.GemmaTokenizer(vocab=words, merges=[]),
        text_encoder=transformers.Gemma2Model(config),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            scaling_factor=0.41407,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            patch_size=1,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


PIPELINES: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker
    for maker in (stable_diffusion, stable_diffusion_2, distilled, sdxl, pixart, sd3, flux, flux_schnell, sana)
}


def save(name: str, folder: Path) -> Path:
    """Save the tiny pipeline of a family with reproducible weights."""
    torch.manual_seed(0)
    return PIPELINES[name](folder)
