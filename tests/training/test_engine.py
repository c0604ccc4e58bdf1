"""Jobs of all kinds together; a failing job doesn't affect the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from client.data import StoredPicture
from common.errors import AntherError
from models.base.base import Base
from models.lora.adapter import Factors, init_adapter
from training.capacity import budget
from training.engine import perform
from training.jobs import EncodeJob, Examples, GeneratedImages, GenerateJob, Picture
from training.variants import VariantOptions


def test_failed_generation_affects_its_own_job(base: Base) -> None:
    start = init_adapter(base.sites, 2, 0)
    broken = {name: Factors(a[:, 1:], b) for name, (a, b) in start.items()}
    picture = Picture(np.zeros((16, 16), np.uint8), "a")
    jobs = [
        GenerateJob(captions=["a", "b"], adapters=[start], seed=0, steps=2),
        GenerateJob(captions=["a"], adapters=[broken], seed=0, steps=2),
        EncodeJob(pictures=[picture]),
        GenerateJob(captions=["b"], adapters=[], seed=0, steps=2),
    ]
    two, failed, encoded, one = perform(base, jobs, memory=budget(None, base.device), timesteps=1)
    assert isinstance(failed, Exception)
    assert isinstance(encoded, Examples)
    assert isinstance(two, GeneratedImages)
    assert isinstance(one, GeneratedImages)
    assert two.pictures.shape == (2, 16, 16)
    assert np.abs(two.pictures[1].astype(int) - one.pictures[0]).max() <= 1  # B is 0, and each image has its own noise
    assert (two.pictures[0] != two.pictures[1]).any()


def test_missing_picture_fails_its_own_job(base: Base, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    stored, gone = StoredPicture(tmp_path / "a.png", "a"), StoredPicture(tmp_path / "b.png", "a")
    (tmp_path / "b.png").unlink()
    jobs = [
        EncodeJob(pictures=[stored, gone]),
        EncodeJob(pictures=[stored]),
        EncodeJob(pictures=[Picture(pixels, "a")]),
    ]
    lost, read, held = perform(base, jobs, memory=budget(None, base.device), timesteps=1)
    assert "b.png" in str(lost)
    assert isinstance(lost, AntherError)
    assert isinstance(read, Examples)
    assert isinstance(held, Examples)
    assert torch.equal(read.latents, held.latents)
    assert torch.equal(read.context, held.context)


class _WithCaptions(Picture):
    @property
    def captions(self) -> tuple[str, ...]:
        return ("a", "b")


def test_variants_are_encoded(base: Base) -> None:
    """They are the examples that separate pictures would give: each caption, its mirror image, and no caption."""
    first, second = np.random.default_rng(0).integers(0, 256, (2, 16, 16), np.uint8)
    options = VariantOptions(captions=True, flip=True, dropout=0.5)
    jobs = [
        EncodeJob(pictures=[_WithCaptions(first, "a"), Picture(second, "c")], options=options),
        EncodeJob(pictures=[Picture(image, "") for image in (first, first[:, ::-1], second, second[:, ::-1])]),
    ]
    encoded, images = perform(base, jobs, memory=budget(None, base.device), timesteps=1)
    assert isinstance(encoded, Examples)
    assert isinstance(images, Examples)
    assert torch.equal(encoded.latents, images.latents[[0, 1, 0, 1, 0, 1, 2, 3, 2, 3]])
    captions = ["a", "a", "b", "b", None, None, "c", "c", None, None]
    assert torch.equal(encoded.context, base.encode_captions(captions))
