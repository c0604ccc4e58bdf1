"""Decoding in little memory yields nearly the same image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.lib.tiny import ATTENTION, save_pipeline
from common.errors import AntherError
from models.base.base import Base
from models.diffusion.decoding import in_tiles, small_vae
from training.capacity import peak_bytes


def tiny() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def kl() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def dc() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()


@pytest.mark.parametrize("make", [tiny, kl, dc])
@torch.no_grad()
def test_tiles_reduce_memory(make: Callable[[], Any]) -> None:
    latents = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    whole, pieces = make(), make()
    in_tiles(pieces, 32, 2)
    expected, actual = whole.decode(latents).sample, pieces.decode(latents).sample
    assert actual.shape == expected.shape == (1, 3, 96, 96)
    assert (actual - expected).square().mean() < 0.25 * expected.var()  # norms see one tile at a time
    assert peak_bytes(lambda: pieces.decode(latents)) < 0.6 * peak_bytes(lambda: whole.decode(latents))


@torch.no_grad()
def test_image_within_one_tile_is_unchanged() -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, pieces = kl(), kl()
    in_tiles(pieces, 32, 2)
    assert torch.equal(pieces.decode(latents).sample, whole.decode(latents).sample)


@pytest.mark.parametrize("side", [-16, 0, 8, 20])
def test_uneven_tiles_are_refused(side: int) -> None:
    with pytest.raises(AntherError, match=rf"tiles of {side} pixels: must be a multiple of 16"):
        in_tiles(kl(), side, 2)


def test_small_vae_decodes(tmp_path: Path) -> None:
    base = Base(save_pipeline(tmp_path / "base", channels=3), sites=ATTENTION)
    own = tiny()
    own.save_pretrained(tmp_path / "small")
    latents = torch.randn(2, *base.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = (own.decode(latents).sample + 1) * 127.5  # it takes scaled latents
    expected = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (base.decode(latents, small=tmp_path / "small") == expected).all()


def test_other_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="holds no safetensors"):
        small_vae(tmp_path)
    kl().save_pretrained(tmp_path / "large")
    with pytest.raises(AntherError, match=r"lacks \d+ of the weights"):
        small_vae(tmp_path / "large")
    tiny().save_pretrained(tmp_path / "torn")
    file = tmp_path / "torn" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AntherError, match="can't load AutoencoderTiny"):
        small_vae(tmp_path / "torn")
