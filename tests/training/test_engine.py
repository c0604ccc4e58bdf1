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
