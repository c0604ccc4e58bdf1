"""Pictures that train the base: printed as before, and drawn with a pen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from conf.schemas.pretraining import StageConfig, TrainBaseConfig
from typefaces import dataset
from typefaces.pretraining import architecture
from typefaces.pretraining.corpus import pictures
from typefaces.pretraining.pen import center_lines
from typefaces.pretraining.vae import encode
from typefaces.strokes import normalize
from typefaces.train_base import PLACES, draw_penned, encode_variants, train_vae

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(dataset.load("public")[:1])[10:14]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return architecture.autoencoder().eval().requires_grad_(False)


def config(folder: Path, pen: float) -> TrainBaseConfig:
    stage = StageConfig(steps=1, batch_size=4, warmup=1, compile=False, bf16=False)
    return TrainBaseConfig(output=str(folder), vae=stage, variants=4, pen=pen)


def test_pen_draws_another_picture_of_the_glyph(images: Tensor) -> None:
    drawn = draw_penned(center_lines(images), PLACES, Generator().manual_seed(0))
    assert drawn.shape == images.shape
    assert drawn.min() >= -1
    assert drawn.max() <= 1
    ink, printed = (1 - drawn).mean((1, 2, 3)), (1 - normalize(images)).mean((1, 2, 3))
    assert ((ink > 0.2 * printed) & (ink < 5 * printed)).all()


def test_variants(images: Tensor, vae: AutoencoderKL, tmp_path: Path) -> None:
    """The first is the glyph itself; without a pen the others are as before."""
    nearness = center_lines(images)
    printed = encode_variants(config(tmp_path, 0.0), vae, images, None)
    mixed = encode_variants(config(tmp_path, 0.5), vae, images, nearness)
    assert printed.shape == mixed.shape == (4, 4, 4, 16, 16)
    torch.testing.assert_close(printed[:, 0], encode(vae, normalize(images)))
    torch.testing.assert_close(mixed[:, :2], printed[:, :2])
    assert (mixed[:, 2:] - printed[:, 2:]).abs().mean((0, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("pen", [0.0, 0.5])
def test_a_step_of_the_autoencoder(images: Tensor, pen: float, tmp_path: Path) -> None:
    trained = train_vae(config(tmp_path, pen), images, center_lines(images) if pen else None)
    assert all(parameter.isfinite().all() for parameter in trained.parameters())


def test_share_of_the_pen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pen=1\.0"):
        replace(config(tmp_path, 0.0), pen=1.0)
